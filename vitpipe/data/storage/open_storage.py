"""Which storage holds a set?"""

from __future__ import annotations

from pathlib import Path

from vitpipe.data.storage.s3 import S3Storage
from vitpipe.data.storage.storage import LocalStorage, Storage


def storage_of(folder: Path, store: str | None) -> Storage:
    """The storage of a set: `store` (s3://bucket/prefix, or a folder), or the set's own folder without one.

    Raises:
        DatasetError: when `store` is no such address.
    """
    if store is None or store.startswith("/"):
        return LocalStorage(Path(store) if store else folder)
    return S3Storage(store)
