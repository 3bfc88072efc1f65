"""Where this machine keeps what can be made again: compiled code, cached shards, measured speeds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$VITPIPE_CACHE`, else `~/.cache/vitpipe`, where compiled wheels are kept, too. Not made here."""
    if given := os.environ.get("VITPIPE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "vitpipe"
    except RuntimeError:  # a container's user of which only a number is known has no home
        return Path(tempfile.gettempdir()) / f"vitpipe-{os.getuid()}"


def writable_cache_folder(name: str) -> Path | None:
    """A folder in the cache folder, made and writable; otherwise one in the folder for temporary files.

    Returns:
        None when neither can be written: in a container with a read-only file system, for example.
    """
    return next(filter(_is_ours, (cache_folder() / name, *_temporary(name))), None)


def _temporary(name: str) -> list[Path]:
    try:
        found = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return []
    # Python's last resort is the working folder, which is the user's.
    return [] if found == Path.cwd() else [found / f"vitpipe-{os.getuid()}" / name]


def _is_ours(folder: Path) -> bool:
    """Whether the folder is there or could be made, belongs to this user, and takes files.

    What lies in it is executed: a folder that another user has made for us in /tmp must not be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return all(place.stat().st_uid == os.getuid() for place in (folder, folder.parent)) and os.access(
            folder, os.W_OK | os.X_OK
        )
    except OSError:
        return False
