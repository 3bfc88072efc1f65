"""Upload shards and archives of a prepared folder to object storage or a shared volume; manifests stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.data.manifest import ShardManifest, write_manifest
from vitpipe.data.shards import files_of
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.prepare.set_summary import Manifest


def address_of(manifest: Manifest, store: str) -> str:
    """URL or folder of a set below `store`: the digest is part of it, so no version overwrites another."""
    # 16 hexadecimal digits are 64 bits: collisions between versions of one dataset are out of the question.
    return f"{store.rstrip('/')}/{manifest.dataset}/{manifest.digest[:16]}"


def keep_in_store(folder: Path, manifest: Manifest, store: str) -> tuple[Manifest, int]:
    """Move the files of a set from its folder to `store`, and record that in its manifest.

    Files that are in the store already are not uploaded again, so the same call continues after a kill.
    Nothing is deleted locally before every upload has been verified.

    Args:
        folder: the set's folder inside the prepared folder.
        store: s3://bucket/prefix, or a folder that every machine mounts at the same path.

    Returns:
        The new manifest, and the number of uploaded files.

    Raises:
        DatasetError: if a file is missing or has changed since it was packed, or the bucket does not exist.
        StorageError: if the storage does not answer or refuses.
    """
    files = list(_files(manifest))
    if not files:
        return manifest, 0
    kept = manifest.model_copy(update={"store": address_of(manifest, store)})
    storage = storage_of(folder, kept.store)
    num_sent = 0
    for name, sha256 in files:
        if not (folder / name).is_file():
            raise DatasetError(
                "A packed file is missing", where=folder / name, fix="run the prepare stage again"
            )
        # `put` compares the file with its checksum and returns False if the storage has it already.
        num_sent += storage.put(folder / name, name, sha256)
    with disk_errors(folder):
        # The manifest first: a kill before the deletion leaves superfluous files, not missing ones.
        write_manifest(folder, kept)
        for name, _ in files:
            (folder / name).unlink()
    return kept, num_sent


def _files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of shards and indexes, or of the archive; none for a folder used in place."""
    if isinstance(manifest, ShardManifest):
        yield from ((name, sha256) for name, sha256, _ in files_of(manifest))
    elif manifest.archive is not None and manifest.archive_sha256 is not None:
        yield manifest.archive, manifest.archive_sha256
