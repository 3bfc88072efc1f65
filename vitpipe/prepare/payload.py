"""Shards and archives out of a prepared folder into object storage or a shared volume; manifests stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.data.manifest import ShardManifest, write_manifest
from vitpipe.data.shards import files_of
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.prepare.set_summary import Manifest


def address_of(manifest: Manifest, store: str) -> str:
    """Where a set is kept below `store`: its digest is in the address, so no version overwrites another."""
    return f"{store.rstrip('/')}/{manifest.dataset}/{manifest.digest[:16]}"


def keep_in_store(folder: Path, manifest: Manifest, store: str) -> tuple[Manifest, int]:
    """Move what a set consists of from its folder to `store`, and write the manifest that says so.

    What is there already is not sent again, so after a kill the same call goes on. Nothing is removed from
    the folder before everything has arrived and been checked.

    Args:
        folder: the set's folder inside the prepared folder.
        store: s3://bucket/prefix, or a folder that every machine sees at the same path.

    Returns:
        The new manifest, and the number of files that were sent.

    Raises:
        DatasetError: when a file is missing or has changed since it was packed, or there is no such bucket.
        StorageError: when the storage does not answer or refuses.
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
        num_sent += storage.put(folder / name, name, sha256)
    with disk_errors(folder):
        write_manifest(folder, kept)
        for name, _ in files:
            (folder / name).unlink()
    return kept, num_sent


def _files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Name and checksum of shards and indexes, or of the archive; nothing of a folder that is pointed at."""
    if isinstance(manifest, ShardManifest):
        yield from ((name, sha256) for name, sha256, _ in files_of(manifest))
    elif manifest.archive is not None and manifest.archive_sha256 is not None:
        yield manifest.archive, manifest.archive_sha256
