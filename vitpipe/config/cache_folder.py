"""Where this machine keeps what can be made again: compiled code, cached shards, measured speeds."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$VITPIPE_CACHE`, else `vitpipe` in the user's cache folder. Not made here."""
    given = os.environ.get("VITPIPE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "vitpipe"
