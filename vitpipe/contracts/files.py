"""Small files that we write and read back, and folders that appear whole: complete, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import disk_errors


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


def read_keys(path: Path) -> dict[str, Any]:
    """Keys and values of a JSON file that nothing depends on; none where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
