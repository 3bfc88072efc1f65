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
