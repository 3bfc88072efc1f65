"""Small files that we write and read back, and folders that appear whole: complete, or not there at all."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from vitpipe.contracts.errors import disk_errors


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, a kill or a full disk leaves the old or the new content, never half of
    it.

    Raises:
        StorageError: when the disk refuses; the old content is still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            with aside.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            aside.replace(path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


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
    """Rename something that does not fit to `NAME.aside-TIME-REASON` beside it; nothing is ever overwritten.

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
    with disk_errors(place):
        place.rename(target)
    return target


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
