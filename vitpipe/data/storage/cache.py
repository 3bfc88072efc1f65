"""A bounded local copy of what was read from remote shards, shared by all processes of a machine.

    CACHE/<checksum of the shard>.shard    sparse: every range at its own offset, holes elsewhere
    CACHE/<checksum of the index>.index    whole

There is no list of what is there. A reader takes what lies at the offset and compares its checksum with
that of the index: a hole, half a write of a killed process and a damaged disk all fail in the same way
and are fetched again. So nothing is locked, and every process may write, delete and be killed at any time.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitpipe.config.cache_folder import cache_folder
from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import InputError

_SHARD, _INDEX = ".shard", ".index"
# Deleting begins below the limit: other processes write on while this one counts.
_FULL_RATIO, _EMPTIED_RATIO = 0.95, 0.9
_KEPT_FREE_BYTES = 2**30
_TOUCH_SECONDS, _ASIDE_SECONDS = 30.0, 60.0
_PAGE_BYTES = 4096


class _Held(NamedTuple):
    """One cached file; the smallest is given up first: shards before indexes, least recently used first."""

    is_index: bool
    used: float
    path: str
    size_bytes: int


class RangeCache:
    """Keeps at most `limit_bytes` of disk in `folder`; a disk that refuses makes it step aside for a minute.

    It may be forked and pickled. Files are opened for each access, which costs microseconds, so a file that
    another process deletes is gone at once.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._allowance_bytes = 0.0  # what may be written before the files are counted again
        self._touched: dict[str, float] = {}
        self._aside_until = 0.0

    def read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        """What lies at a place of the shard `key` (its SHA-256): perhaps the bytes, perhaps zeros.

        The caller must compare checksums. None when it is certain that nothing is there.
        """
        try:
            file = os.open(self._path(key), os.O_RDONLY)
        except OSError:
            return None
        try:
            self._touch(key, file)
            block = os.pread(file, size_bytes, offset)
        except OSError:
            return None
        finally:
            os.close(file)
        return block if len(block) == size_bytes else None

    def write(self, key: str, offset: int, block: bytes) -> None:
        """Keep a range of the shard `key`, if there is room; never raises for the disk's sake."""
        if self.limit_bytes == 0 or time.monotonic() < self._aside_until:
            return
        coming_bytes = len(block) + 2 * _PAGE_BYTES
        self._allowance_bytes -= coming_bytes
        try:
            if self._allowance_bytes < 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._make_room(coming_bytes)
            file = os.open(self._path(key), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, block, offset)
            finally:
                os.close(file)
        except OSError as error:
            self._step_aside(error)

    def index(
        self, sha256: str, size_bytes: int, fetch: Callable[[], Iterable[bytes]], *, check: bool
    ) -> Path | None:
        """The index with this checksum as a local file; fetched when it is not here, once more when damaged.

        Args:
            check: compare the checksum of a file that is here, too, not only its size.

        Returns:
            None when the disk refuses, or what is fetched has another checksum. Raises what `fetch` raises.
        """
        path = self.folder / f"{sha256}{_INDEX}"
        try:
            if path.stat().st_size == size_bytes and (not check or file_digest(path) == sha256):
                os.utime(path)
                return path
        except OSError:
            pass
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                with aside.open("wb") as file:
                    file.writelines(fetch())
                if file_digest(aside) == sha256:
                    aside.replace(path)
                    return path
        except OSError as error:
            self._step_aside(error)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        return None

    @property
    def size_bytes(self) -> int:
        """Disk space in use."""
        return sum(held.size_bytes for held in self._held())

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key}{_SHARD}"

    def _touch(self, key: str, file: int) -> None:
        """Note the use; by modification time, because many disks do not keep that of the last access."""
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[key] = now
            with suppress(OSError):
                os.utime(file)

    def _held(self) -> list[_Held]:
        held = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process is deleting, too
                    stat = entry.stat()
                    is_index = not entry.name.endswith(_SHARD)
                    held.append(_Held(is_index, stat.st_mtime, entry.path, stat.st_blocks * 512))
        return held

    def _make_room(self, coming_bytes: int, kept_ratio: float = 1.0) -> None:
        """Delete what was not used for longest until the rest is below the limit and the disk has some room.

        Args:
            coming_bytes: what is about to be written.
            kept_ratio: keep no more than this share of what is there.

        Raises:
            OSError: when others have filled the disk.
        """
        held = self._held()
        total = sum(file.size_bytes for file in held) + coming_bytes
        room = total + shutil.disk_usage(self.folder).free - _KEPT_FREE_BYTES
        full = min(self.limit_bytes * _FULL_RATIO, room)
        if total > full or kept_ratio < 1:
            goal = min(self.limit_bytes * _EMPTIED_RATIO, room, total * kept_ratio)
            for file in sorted(held):
                if total <= goal:
                    break
                Path(file.path).unlink(missing_ok=True)
                total -= file.size_bytes
        if total > full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Many processes write at once and each counts for itself: the closer the limit, the more often.
        self._allowance_bytes = max((full - total) / 64, self.limit_bytes / 4096)

    def _step_aside(self, error: OSError) -> None:
        self._aside_until = time.monotonic() + _ASIDE_SECONDS
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                self._make_room(0, kept_ratio=0.75)  # a training state may need the room more
        warnings.warn(
            f"The cache of remote shards in {self.folder} is not used for a while ({error.strerror}); "
            "reading goes on without it. Set VITPIPE_CACHE to another disk or VITPIPE_CACHE_GB to less.",
            stacklevel=2,
        )


def shard_cache() -> RangeCache:
    """The cache in `shards` of the cache folder (`$VITPIPE_CACHE`), of at most `$VITPIPE_CACHE_GB` (50) GB.

    Raises:
        InputError: when the size is no number.
    """
    gigabytes = os.environ.get("VITPIPE_CACHE_GB") or "50"
    try:
        limit_bytes = int(float(gigabytes) * 1e9)
        if limit_bytes < 0:
            raise ValueError(gigabytes)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"VITPIPE_CACHE_GB is '{gigabytes}', which is no size",
            fix="give a number of gigabytes, 0 to keep nothing",
        ) from error
    return RangeCache(cache_folder() / "shards", limit_bytes)
