"""COCO, ADE20K and DAVIS keep their own layouts: packed as one tar per set, or left in the user's folder.

Embedded sets and original archives travel as one tar (a version control of data must not track folders of
images) and are unpacked once beside the training; a user's folder may be used where it lies.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.data.archives import unpack_tar
from vitpipe.data.layouts import VERIFY_DENSE, DenseLayout
from vitpipe.data.manifest import DenseManifest, content_digest, read_manifest, write_manifest
from vitpipe.data.shard_writer import tar_header
from vitpipe.data.storage.find import storage_of
from vitpipe.data.storage.storage import blocks_of

_BLOCK = 512
_AGAIN = "run the prepare stage again, or copy the prepared folder anew"


@dataclass(frozen=True)
class DenseFolder:
    """A dense set ready to read, in its own layout below `root`.

    Attributes:
        classes: category names in label order; for ADE20K label 0 (other) is not among them.
        counts: numbers of pictures and annotations, for example `train_images`.
    """

    root: Path
    classes: tuple[str, ...]
    digest: str
    counts: dict[str, int]


def pack_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a set as one tar with its layout inside, and its manifest; equal files give equal bytes.

    Files are copied piece by piece, out of archives too. The tar has another name until it is whole.

    Raises:
        DatasetError: when a file cannot be read, or changes meanwhile.
        StorageError: when the disk refuses a write.
    """
    name = f"{layout.dataset}.tar"
    partial = out / f".{name}.partial"
    sha256, size = hashlib.sha256(), 0
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as archive:
            for block in _tar_blocks(layout):
                archive.write(block)
                sha256.update(block)
                size += len(block)
            archive.flush()
            os.fsync(archive.fileno())
        partial.replace(out / name)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            archive=name,
            form=layout.form,
            archive_sha256=sha256.hexdigest(),
            size_bytes=size,
            digest="",
        )
        return _finish(manifest, out)


def point_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a manifest that points at the user's folder.

    The digest covers names and sizes of all files, and the content of JSON and text files.

    Raises:
        DatasetError: when the set, or a part of it, lies in its original archives.
        StorageError: when the disk refuses a write.
    """
    if not layout.is_folder:
        raise DatasetError(
            f"'{layout.dataset}' lies in {layout.form}, which cannot be used in their place",
            where=layout.root,
            mend="set data.keep_dense to pack or auto, or unpack the archives there",
        )
    sizes = {name: (layout.root / name).stat().st_size for name in layout.files}
    texts = [name for name in layout.files if name.endswith((".json", ".txt"))]
    listing = {"sizes": sizes, "texts": {name: file_digest(layout.root / name) for name in texts}}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            form=layout.form,
            archive_sha256=digest_of(listing),
            size_bytes=sum(sizes.values()),
            root=layout.root.resolve(),
            digest="",
        )
        return _finish(manifest, out)


def open_dense(prepare_folder: Path, dataset: str, scratch: Path) -> DenseFolder:
    """Make a prepared dense set readable.

    Args:
        dataset: `coco`, `ade20k` or `davis`.
        scratch: where an archive is unpacked to, once per content; may be shared by runs and ranks.

    Raises:
        DatasetError: when the set was not prepared, its archive has changed, or the user's folder is gone
            or no longer what was verified.
        StorageError: when the disk refuses a write.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is not None:
        root = scratch / f"{dataset}-{manifest.digest[:16]}"
        if not root.is_dir():
            _unpack(folder, manifest, root)
    else:
        root = _checked_root(manifest, folder)
    return DenseFolder(root, manifest.classes, manifest.digest, manifest.counts)


def check_dense(prepare_folder: Path, dataset: str, *, checksums: bool) -> DenseManifest:
    """Compare a prepared dense set with its manifest, without unpacking.

    Args:
        checksums: also read the archive; else its size must do.

    Raises:
        DatasetError: as `open_dense`.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is None:
        _checked_root(manifest, folder)
        return manifest
    storage = storage_of(folder, manifest.store)
    if storage.size_bytes(manifest.archive) != manifest.size_bytes:
        where = storage.place(manifest.archive)
        raise DatasetError("The archive is missing or has another size", where=where, mend=_AGAIN)
    if checksums:
        total = hashlib.sha256()
        for block in blocks_of(storage, manifest.archive, manifest.size_bytes):
            total.update(block)
        _compare(total.hexdigest(), manifest, storage.place(manifest.archive))
    return manifest


def _finish(manifest: DenseManifest, out: Path) -> DenseManifest:
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    write_manifest(out, manifest)
    return manifest


def _tar_blocks(layout: DenseLayout) -> Iterator[bytes]:
    """The bytes of a tar with all files of a set."""
    for name in layout.files:
        size = layout.tree.size_bytes(name)
        yield tar_header(name, size)
        num_bytes = 0
        for chunk in layout.tree.chunks(name):
            num_bytes += len(chunk)
            yield chunk
        if num_bytes != size:
            raise DatasetError(
                f"A file has {num_bytes} bytes instead of {size}: it changed while it was being packed",
                where=layout.tree.where(name),
                mend="let nobody write to the set meanwhile, and run the prepare stage again",
            )
        yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)  # a tar file ends with two empty blocks


def _unpack(folder: Path, manifest: DenseManifest, root: Path) -> None:
    """Unpack into a new folder; ranks and runs that do it at the same time do not disturb each other."""
    storage = storage_of(folder, manifest.store)
    assert manifest.archive is not None
    if not storage.is_remote:
        archive = Path(storage.place(manifest.archive))
        if not archive.is_file():
            raise DatasetError("The archive is missing", where=archive, mend=_AGAIN)
        _compare(file_digest(archive), manifest, archive)
        unpack_tar(archive, root, limit_bytes=manifest.size_bytes)
        return
    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as aside:
            fetched = Path(aside) / manifest.archive
            storage.fetch(manifest.archive, fetched)
            _compare(file_digest(fetched), manifest, storage.place(manifest.archive))
            unpack_tar(fetched, root, limit_bytes=manifest.size_bytes)


def _compare(sha256: str, manifest: DenseManifest, where: str | Path) -> None:
    if sha256 != manifest.archive_sha256:
        raise DatasetError("The archive's checksum is not that of the manifest", where=where, mend=_AGAIN)


def _checked_root(manifest: DenseManifest, folder: Path) -> Path:
    root = manifest.root
    if root is None or not root.is_dir():
        raise DatasetError(
            f"The folder of '{manifest.dataset}' that was prepared is not there",
            where=root or folder,
            mend="mount it at the same place, or run the prepare stage again with the new data.root",
        )
    found = VERIFY_DENSE[manifest.dataset](root).counts
    if found != manifest.counts:
        raise DatasetError(
            f"The folder has changed since it was prepared: {found} instead of {manifest.counts}",
            where=root,
            mend="run the prepare stage again",
        )
    return root
