"""What a storage of shards can do, and the one that is a folder; `s3.py` has the remote one."""

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
_BLOCK_BYTES = 8 * 2**20
_PACK_AGAIN = "run the prepare stage again, or copy the prepared folder anew"


class Storage(Protocol):
    """A place of immutable files with plain names."""

    is_remote: bool

    def place(self, name: str) -> str:
        """Path or address of a file, for messages."""

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """A range of a file; shorter only where the file ends.

        Raises:
            DatasetError: when there is no such file.
            StorageError: when a remote storage does not answer or refuses.
        """

    def size_bytes(self, name: str) -> int | None:
        """Size of a file; None when there is none. Raises as `read`."""

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files, by one listing. Raises as `read`."""

    def fetch(self, name: str, to: Path) -> None:
        """Copy a file to `to`, which appears when it is complete.

        Raises:
            DatasetError: as `read`.
            StorageError: as `read`; also when the disk refuses the write.
        """

    def put(self, path: Path, name: str, sha256: str) -> bool:
        """Store a file under a name; sent only if it is not there, and checked afterwards.

        Returns:
            Whether it was sent.

        Raises:
            DatasetError: when the file at `path` has another checksum.
            StorageError: as `fetch`.
        """

    def close(self) -> None:
        """Close what is open; everything opens again when needed."""


def blocks_of(storage: Storage, name: str, size_bytes: int) -> Iterator[bytes]:
    """A whole file of known size in pieces of 8 MiB; raises as `Storage.read`."""
    for offset in range(0, size_bytes, _BLOCK_BYTES):
        yield storage.read(name, offset, min(_BLOCK_BYTES, size_bytes - offset))


class LocalStorage:
    """Files of one folder. For one thread at a time; forked and unpickled copies work on their own."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()

    def place(self, name: str) -> str:
        """Path of a file."""
        return str(self.folder / name)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See `Storage.read`."""
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
                f"The folder of the shards cannot be listed ({error.strerror})",
                where=self.folder,
                fix=_PACK_AGAIN,
            ) from error

    def fetch(self, name: str, to: Path) -> None:
        """See `Storage.fetch`."""
        self._open(name)
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
            try:
                aside.hardlink_to(path)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(path, aside)
            if file_digest(aside) != sha256:
                raise changed_file(path)
        return True

    def close(self) -> None:
        """See `Storage.close`."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
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
                    f"A shard cannot be used: it cannot be opened ({error.strerror})",
                    where=self.folder / name,
                    fix=_PACK_AGAIN,
                ) from error
            self._files[name] = file
        return file


def changed_file(path: Path) -> DatasetError:
    """The error for a file whose checksum is not that of the manifest."""
    return DatasetError("A file has changed since it was packed", where=path, fix=_PACK_AGAIN)
