"""Prepared dense sets (COCO, ADE20K, DAVIS) in their own layout: unpacked once, or used in place."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.data.manifest import DenseManifest, SetManifest, read_manifest
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.data.storage.storage import Storage, blocks_of
from vitpipe.datasets.archives import unpack_tar
from vitpipe.datasets.layouts import DenseLayout, verified

REDO = "run the prepare stage again, or copy the prepared folder again"


@dataclass(frozen=True)
class DenseFolder:
    """A dense set ready to read, in its own layout below `root`.

    Attributes:
        classes: category names in label order; label 0 (other) of ADE20K is not included.
        counts: numbers of images and annotations by name, for example `train_images`.
        scratch: folder for what is derived from the set; may be shared by runs and ranks.
    """

    root: Path
    classes: tuple[str, ...]
    digest: str
    counts: dict[str, int]
    scratch: Path


def open_dense(prepare_folder: Path, dataset: str, scratch: Path, kind: str = "") -> DenseFolder:
    """Make a prepared dense set readable.

    Args:
        dataset: `coco`, `ade20k`, `davis` or another set in one of these layouts.
        kind: the layout that it must have; any if empty.
        scratch: folder that an archive is unpacked into, once per content; may be shared by runs and ranks.

    Raises:
        DatasetError: when the set was not prepared or is of another kind, its archive has changed, or the
            user's folder is missing or has changed since it was verified.
        StorageError: when the disk refuses a write.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, SetManifest).root
    found = kind_of(manifest) if isinstance(manifest, DenseManifest) else "images with classes"
    if not isinstance(manifest, DenseManifest) or kind not in ("", found):
        raise DatasetError(
            f"'{dataset}' is a set of another kind: {found} instead of {kind or 'scenes with annotations'}",
            where=folder,
            fix="name a set in this layout as `dataset` of this stage; `vitpipe datasets` lists them",
        )
    if manifest.archive is not None:
        # Named by content: another version of the set gets another folder. 16 hexadecimal digits are 64 bits.
        root = scratch / f"{dataset}-{manifest.digest[:16]}"
        # `unpack_tar` renames the folder when it is complete, so that its existence is enough.
        if not root.is_dir():
            _unpack(folder, manifest, root)
    else:
        root = checked_layout(manifest, folder).root
    return DenseFolder(root, manifest.classes, manifest.digest, manifest.counts, scratch)


def check_dense(prepare_folder: Path, dataset: str, *, checksums: bool) -> DenseManifest:
    """Compare a prepared dense set with its manifest, without unpacking.

    Args:
        checksums: read the archive and compare its SHA-256 as well; otherwise only its size.

    Raises:
        DatasetError: as `open_dense`.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is None:
        checked_layout(manifest, folder)
        return manifest
    storage = whole_archive(folder, manifest)
    if checksums:
        total = hashlib.sha256()
        for block in blocks_of(storage, manifest.archive, manifest.size_bytes):
            total.update(block)
        require_checksum(total.hexdigest(), manifest, storage.place(manifest.archive))
    return manifest


def whole_archive(folder: Path, manifest: DenseManifest) -> Storage:
    """The storage that holds a set's archive.

    Args:
        folder: of the manifest.

    Raises:
        DatasetError: when it is missing there or has another size.
    """
    storage = storage_of(folder, manifest.store)
    assert manifest.archive is not None
    if storage.size_bytes(manifest.archive) != manifest.size_bytes:
        where = storage.place(manifest.archive)
        raise DatasetError("The archive is missing or has a different size", where=where, fix=REDO)
    return storage


def _unpack(folder: Path, manifest: DenseManifest, root: Path) -> None:
    """Verify the archive and unpack it; safe when several ranks and runs do so at the same time."""
    storage = storage_of(folder, manifest.store)
    assert manifest.archive is not None
    # The contents of a tar are smaller than the tar, so its size bounds them.
    limit_bytes = manifest.size_bytes
    if not storage.is_remote:
        archive = Path(storage.place(manifest.archive))
        if not archive.is_file():
            raise DatasetError("The archive is missing", where=archive, fix=REDO)
        require_checksum(file_digest(archive), manifest, archive)
        unpack_tar(archive, root, limit_bytes=limit_bytes)
        return
    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: /tmp may be too small for COCO (20 GB). One folder per process, so that no rank
        # reads a file that another one is still fetching.
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
            fetched = Path(temporary) / manifest.archive
            storage.fetch(manifest.archive, fetched)
            require_checksum(file_digest(fetched), manifest, storage.place(manifest.archive))
            unpack_tar(fetched, root, limit_bytes=limit_bytes)


def require_checksum(sha256: str, manifest: DenseManifest, where: str | Path) -> None:
    """Compare the SHA-256 of a set's archive with its manifest.

    Raises:
        DatasetError: when they differ.
    """
    if sha256 != manifest.archive_sha256:
        raise DatasetError("The archive's checksum differs from the manifest's", where=where, fix=REDO)


def checked_layout(manifest: DenseManifest, folder: Path) -> DenseLayout:
    """The user's folder of a set that was not packed.

    Args:
        folder: of the manifest, for the message.

    Raises:
        DatasetError: when it is missing, or other files are in it than when it was prepared.
    """
    root = manifest.root
    if root is None or not root.is_dir():
        raise DatasetError(
            f"The prepared folder of '{manifest.dataset}' is missing",
            where=root or folder,
            fix="mount it at the same path, or run the prepare stage again with the new data.root",
        )
    # Names and counts, not contents: reading the 20 GB of COCO before every run would take minutes.
    found = verified(kind_of(manifest), root, manifest.dataset)
    if found.counts != manifest.counts:
        raise DatasetError(
            f"The folder has changed since it was prepared: found {found.counts}, expected {manifest.counts}",
            where=root,
            fix="run the prepare stage again",
        )
    return found


def kind_of(manifest: DenseManifest) -> str:
    """The layout of a prepared set."""
    return manifest.layout or manifest.dataset
