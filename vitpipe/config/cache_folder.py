"""Where this machine keeps what can be made again: compiled code, cached shards, measured speeds."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$VITPIPE_CACHE`, else `~/.cache/vitpipe`, where compiled wheels are kept, too. Not made here."""
    given = os.environ.get("VITPIPE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "vitpipe"
