"""Chooses the storage of a set by its address."""

from __future__ import annotations

from pathlib import Path

from vitpipe.data.storage.s3 import S3Storage
from vitpipe.data.storage.storage import LocalStorage, Storage


def storage_of(folder: Path, store: str | None) -> Storage:
    """The storage of a set.

    Args:
        folder: of the set's manifest; holds the shards if there is no `store`.
        store: s3://bucket/prefix or an absolute path; `None` for `folder`.

    Raises:
        DatasetError: when `store` is neither.
    """
    if store is None or store.startswith("/"):
        return LocalStorage(Path(store) if store else folder)
    return S3Storage(store)
