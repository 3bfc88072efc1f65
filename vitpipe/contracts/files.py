"""Small files that we write and read back, and folders that appear whole: complete, or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import disk_errors

_KINDS = (
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@contextmanager
def written_aside(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Write a file under another name, then rename it: a reader, a kill or a full disk leaves the old or the
    new content, never half of it.

    Args:
        partial: the other name. Give one that stays the same from attempt to attempt where a killed process
            would leave a large file behind.

    Yields:
        The path to write to. It must exist when the block ends.

    Raises:
        StorageError: when the disk refuses; the old content is still there.
    """
    # Two processes or threads may write the same file at once: each has its own name, the last rename wins.
    # The suffix stays because kfp's compiler chooses the format by it.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    aside = partial or path.with_name(f".{path.stem}.{writer}{path.suffix}")
    with disk_errors(path):
        try:
            yield aside
            with aside.open("rb+") as handle:
                os.fsync(handle.fileno())  # before the rename: ext4 may write the name first
            aside.replace(path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """`written_aside` for a small text file (UTF-8).

    Raises:
        StorageError: when the disk refuses; the old content is still there.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def require_regular(path: Path) -> None:
    """Refuse a path that is no regular file: opening a named pipe waits for a writer, for ever.

    Raises:
        OSError: there is nothing, a folder, or a named pipe, socket or device; `strerror` says which.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = next((name for found, name in _KINDS if found(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))


def read_text(path: Path) -> str:
    """The text (UTF-8) of a file that a user has named.

    Raises:
        OSError: it cannot be read, or as `require_regular`.
        UnicodeDecodeError: it is not UTF-8.
    """
    require_regular(path)
    return path.read_text(encoding="utf-8")


def read_keys(path: Path) -> dict[str, Any]:
    """Keys and values of a JSON file that nothing depends on; none where it is missing or damaged."""
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def linked_or_copied(source: Path, target: Path) -> None:
    """Give a file that is replaced but never edited a second name, or copy it to another disk.

    Raises:
        OSError: the disk refuses.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Force renames inside a folder to the disk, where the file system knows how."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # mounted buckets refuse it
    finally:
        os.close(descriptor)


def move_aside(place: Path, reason: str) -> Path:
    """Rename a file or folder to `NAME.aside-TIME-REASON` beside it; never overwrites anything.

    Args:
        reason: words joined by hyphens, for the name.

    Returns:
        The new place.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target, number = place.with_name(f"{place.name}.aside-{stamp}-{reason}"), 2
    while target.exists():
        target = place.with_name(f"{place.name}.aside-{stamp}-{reason}-{number}")
        number += 1
    # The seconds in the name can be equal for two folders; rename would replace an empty one.
    with disk_errors(place):
        place.rename(target)
    return target


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, as those of `vitpipe compile --dvc`; False if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def size_bytes(place: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if place.is_symlink() or not place.is_dir():
        return place.lstat().st_size
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(place) for name in names)


def remove(place: Path) -> None:
    """Remove a file, a link (never what it points to) or a whole folder."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
    else:
        shutil.rmtree(place, ignore_errors=True)
