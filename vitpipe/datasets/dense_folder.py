"""A prepared set in its own layout (COCO, ADE20K, DAVIS), ready to read: unpacked once, or where it lies."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.data.manifest import DenseManifest, read_manifest
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.data.storage.storage import blocks_of
from vitpipe.datasets.archives import unpack_tar
from vitpipe.datasets.layouts import VERIFY_DENSE

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
        raise DatasetError("The archive is missing or has another size", where=where, fix=_AGAIN)
    if checksums:
        total = hashlib.sha256()
        for block in blocks_of(storage, manifest.archive, manifest.size_bytes):
            total.update(block)
        _compare(total.hexdigest(), manifest, storage.place(manifest.archive))
    return manifest


def _unpack(folder: Path, manifest: DenseManifest, root: Path) -> None:
    """Unpack into a new folder; ranks and runs that do it at the same time do not disturb each other."""
    storage = storage_of(folder, manifest.store)
    assert manifest.archive is not None
    if not storage.is_remote:
        archive = Path(storage.place(manifest.archive))
        if not archive.is_file():
            raise DatasetError("The archive is missing", where=archive, fix=_AGAIN)
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
        raise DatasetError("The archive's checksum is not that of the manifest", where=where, fix=_AGAIN)


def _checked_root(manifest: DenseManifest, folder: Path) -> Path:
    root = manifest.root
    if root is None or not root.is_dir():
        raise DatasetError(
            f"The folder of '{manifest.dataset}' that was prepared is not there",
            where=root or folder,
            fix="mount it at the same place, or run the prepare stage again with the new data.root",
        )
    found = VERIFY_DENSE[manifest.dataset](root).counts
    if found != manifest.counts:
        raise DatasetError(
            f"The folder has changed since it was prepared: {found} instead of {manifest.counts}",
            where=root,
            fix="run the prepare stage again",
        )
    return root
