"""The interface of a storage of shards, and its implementation for a local folder."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import written_aside

# The usual limit of a process is 1,024 open files; the largest sets have several thousand shards.
_MAX_OPEN_FILES = 256
# One request per block where the file is remote, and one block in memory.
_BLOCK_BYTES = 8 * 2**20
_PACK_AGAIN = "run the prepare stage again, or copy the prepared folder again"


class Storage(Protocol):
    """Immutable files in one flat folder or below one prefix.

    Files are never changed in place: a new version of a file replaces the old one.
    """

    is_remote: bool

    def place(self, name: str) -> str:
        """Path or address of a file, for messages."""

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """A byte range of a file; shorter only at the end of the file.

        Raises:
            DatasetError: when there is no such file.
            StorageError: when a remote storage does not respond or denies access.
        """

    def size_bytes(self, name: str) -> int | None:
        """Size of a file; `None` if it does not exist. Raises as `read`."""

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files, by one listing. Raises as `read`."""

    def fetch(self, name: str, to: Path) -> None:
        """Copy a file to `to`, which appears only when it is complete.

        Raises:
            DatasetError: as `read`.
            StorageError: as `read`; also when the disk refuses the write.
        """

    def put(self, path: Path, name: str, sha256: str) -> bool:
        """Store a file under a name unless an identical one exists, and verify it.

        Returns:
            Whether it was sent.

        Raises:
            DatasetError: when the checksum of the file at `path` is not `sha256`.
            StorageError: as `fetch`.
        """

    def close(self) -> None:
        """Close open files; the next call opens them again."""


def blocks_of(storage: Storage, name: str, size_bytes: int) -> Iterator[bytes]:
    """A whole file of known size in blocks of 8 MiB. Raises as `Storage.read`."""
    for offset in range(0, size_bytes, _BLOCK_BYTES):
        yield storage.read(name, offset, min(_BLOCK_BYTES, size_bytes - offset))


class LocalStorage:
    """Files of one folder. Not thread-safe; forked and unpickled copies are independent."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Open file descriptors, oldest first: opening a shard for every image would cost a path look-up.
        self._files: OrderedDict[str, int] = OrderedDict()

    def place(self, name: str) -> str:
        """Path of a file."""
        return str(self.folder / name)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See `Storage.read`."""
        # pread has no file position, which forked processes would share.
        return os.pread(self._open(name), size_bytes, offset)

    def size_bytes(self, name: str) -> int | None:
        """See `Storage.size_bytes`."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def sizes(self) -> dict[str, int]:
        """See `Storage.sizes`."""
        try:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise DatasetError(
                f"The shard folder cannot be listed ({error.strerror})",
                where=self.folder,
                fix=_PACK_AGAIN,
            ) from error

    def fetch(self, name: str, to: Path) -> None:
        """See `Storage.fetch`."""
        self._open(name)  # raises DatasetError if the file is missing
        with written_aside(to) as aside:
            shutil.copyfile(self.folder / name, aside)

    def put(self, path: Path, name: str, sha256: str) -> bool:
        """See `Storage.put`."""
        target = self.folder / name
        if target.is_file() and file_digest(target) == sha256:
            return False
        with disk_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as aside:
            # A link costs no space and no copy, and is safe because packed files are never changed in place.
            try:
                aside.hardlink_to(path)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(path, aside)
            if file_digest(aside) != sha256:
                raise changed_file(path)
        return True

    def close(self) -> None:
        """See `Storage.close`."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors are numbers of this process and mean other files elsewhere.
        return {"folder": self.folder, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _open(self, name: str) -> int:
        file = self._files.get(name)
        if file is None:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            try:
                file = os.open(self.folder / name, os.O_RDONLY)
            except OSError as error:
                raise DatasetError(
                    f"A shard cannot be opened ({error.strerror})",
                    where=self.folder / name,
                    fix=_PACK_AGAIN,
                ) from error
            self._files[name] = file
        return file


def changed_file(path: Path) -> DatasetError:
    """The error for a file whose checksum differs from the manifest."""
    return DatasetError("A file has changed since it was packed", where=path, fix=_PACK_AGAIN)
