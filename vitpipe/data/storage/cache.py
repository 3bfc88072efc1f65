"""A bounded local cache of byte ranges of remote shards, shared by all processes of a machine.

    CACHE/<SHA-256 of the shard>.shard    sparse file: every range at its own offset, holes elsewhere
    CACHE/<SHA-256 of the index>.index    complete file

There is no table of contents and no lock: every process may write, delete and be killed at any time. The
caller verifies the checksum of what it reads; a hole, a partial write of a killed process and a damaged disk
all fail this check and are fetched again.
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
# Shares of the limit at which deleting begins and ends. Below 1, because other processes keep writing while
# this one counts; apart, so that not every write deletes.
_FULL_RATIO, _EMPTIED_RATIO = 0.95, 0.9
# Left free on the disk whatever the limit: training states may be on the same disk.
_KEPT_FREE_BYTES = 2**30
# A file's use is recorded at most every 30 s: often enough to order evictions, too rare to cost time.
_TOUCH_SECONDS = 30.0
# After a refused write the cache stays unused this long, so that a full disk does not cost every read a
# failed write and a warning.
_SUSPENDED_SECONDS = 60.0
_PAGE_BYTES = 4096


class _CachedFile(NamedTuple):
    """One cached file. The fields are in the order of eviction: shards before indexes, then by last use."""

    is_index: bool
    used: float
    path: str
    size_bytes: int


class RangeCache:
    """A cache of at most `limit_bytes` of disk space in `folder`; suspended for a minute after a disk error.

    It may be forked and pickled. Files are opened for each access, which costs microseconds, so the space of
    a file that another process deletes is free at once.

    Args:
        folder: made when first written to.
        limit_bytes: over all processes; 0 switches the cache off.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._allowance_bytes = 0.0  # may be written before the files are counted again
        self._touched: dict[str, float] = {}
        self._suspended_until = 0.0

    def read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        """The bytes at an offset of the shard `key` (its SHA-256), zeros where nothing was written.

        The caller must verify the checksum.

        Returns:
            `None` when the range is certainly not cached.
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
        """Cache a byte range of the shard `key`, if there is room. Never raises for a disk error."""
        if self.limit_bytes == 0 or time.monotonic() < self._suspended_until:
            return
        # A range that is not aligned touches up to two more pages of disk than its length.
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
            self._suspend(error)

    def index(
        self, sha256: str, size_bytes: int, fetch: Callable[[], Iterable[bytes]], *, check: bool
    ) -> Path | None:
        """The index with this checksum as a local file; fetched if it is not cached or is damaged.

        Args:
            sha256: of the index.
            size_bytes: of the index.
            fetch: yields the content of the remote index; its errors are raised.
            check: verify the checksum of a cached file, not only its size.

        Returns:
            `None` after a disk error, or when the fetched content has another checksum twice.
        """
        path = self.folder / f"{sha256}{_INDEX}"
        try:
            if path.stat().st_size == size_bytes and (not check or file_digest(path) == sha256):
                os.utime(path)  # recently used
                return path
        except OSError:
            pass
        # Unlike ranges, an index must appear complete: it is memory-mapped and not verified per record.
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(2):  # bytes may be damaged in transit once
                with aside.open("wb") as file:
                    file.writelines(fetch())
                if file_digest(aside) == sha256:
                    aside.replace(path)
                    return path
        except OSError as error:
            self._suspend(error)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        return None

    @property
    def size_bytes(self) -> int:
        """Disk space in use by the whole cache folder."""
        return sum(file.size_bytes for file in self._cached_files())

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key}{_SHARD}"

    def _touch(self, key: str, file: int) -> None:
        """Record a use as modification time; access times are often switched off (noatime, relatime)."""
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[key] = now
            with suppress(OSError):
                os.utime(file)

    def _cached_files(self) -> list[_CachedFile]:
        files = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process may delete it meanwhile
                    stat = entry.stat()
                    # Partial downloads of indexes count as indexes: they are deleted last.
                    is_index = not entry.name.endswith(_SHARD)
                    # Blocks of 512 bytes (POSIX), not st_size: holes of a sparse file take no space.
                    files.append(_CachedFile(is_index, stat.st_mtime, entry.path, stat.st_blocks * 512))
        return files

    def _make_room(self, coming_bytes: int, kept_ratio: float = 1.0) -> None:
        """Delete least recently used files until the cache is below its limit and the disk has free space.

        Args:
            coming_bytes: about to be written.
            kept_ratio: keep at most this share of the cached bytes.

        Raises:
            OSError: when the disk is full although the cache is empty.
        """
        files = self._cached_files()
        total = sum(file.size_bytes for file in files) + coming_bytes
        # What the cache may hold when `_KEPT_FREE_BYTES` of the disk stay free.
        room = total + shutil.disk_usage(self.folder).free - _KEPT_FREE_BYTES
        full = min(self.limit_bytes * _FULL_RATIO, room)
        if total > full or kept_ratio < 1:
            goal = min(self.limit_bytes * _EMPTIED_RATIO, room, total * kept_ratio)
            for file in sorted(files):
                if total <= goal:
                    break
                Path(file.path).unlink(missing_ok=True)
                total -= file.size_bytes
        if total > full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Each process counts for itself. With a 64th of the space that is left, 64 processes together do not
        # exceed the limit; the nearer the limit, the more often they count. The floor of 1/4096 bounds how
        # often: `_FULL_RATIO` leaves room for 200 such allowances.
        self._allowance_bytes = max((full - total) / 64, self.limit_bytes / 4096)

    def _suspend(self, error: OSError) -> None:
        self._suspended_until = time.monotonic() + _SUSPENDED_SECONDS
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                self._make_room(0, kept_ratio=0.75)  # a training state may need the space more
        warnings.warn(
            f"The cache of remote shards in {self.folder} is not used for {_SUSPENDED_SECONDS:.0f} s "
            f"({error.strerror}); reads go to the storage meanwhile. "
            "Fix: set VITPIPE_CACHE to another disk, or VITPIPE_CACHE_GB to less.",
            stacklevel=2,
        )


def shard_cache() -> RangeCache:
    """The cache in `shards` of the cache folder (`$VITPIPE_CACHE`), of at most `$VITPIPE_CACHE_GB` (50) GB.

    Raises:
        InputError: when `$VITPIPE_CACHE_GB` is not a number of at least 0.
    """
    gigabytes = os.environ.get("VITPIPE_CACHE_GB") or "50"
    try:
        limit_bytes = int(float(gigabytes) * 1e9)  # nan and inf fail here
        if limit_bytes < 0:
            raise ValueError(gigabytes)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"VITPIPE_CACHE_GB is '{gigabytes}', which is not a size",
            where="environment variable VITPIPE_CACHE_GB",
            fix="set it to a number of gigabytes; 0 switches the cache off",
        ) from error
    return RangeCache(cache_folder() / "shards", limit_bytes)
