"""What was found in source files, kept by content in the user's cache folder: most processes read the same.

Parsing the 200 modules of a closure takes a second, in every stage and every verb that plans. An entry's key
is the digest of a file's content and of the code that reads it: no entry is ever out of date, and all copies
of a checkout share one file. Nothing depends on the cache: where it cannot be used, files are parsed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from vitpipe.config.cache_folder import cache_folder
from vitpipe.contracts.errors import StorageError
from vitpipe.contracts.files import write_whole

_MAX_ENTRIES = 4000  # about 2 MB; a checkout has 250 modules, and an edit adds one entry
_FILE = "code.json"


class CodeCache:
    """Key -> what was found; new entries are written when the process ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_new = path, False
        self._found = self._read()

    def get(self, key: str) -> Any:
        """What was found under this key; None if nothing was."""
        return self._found.get(key)

    def put(self, key: str, found: Any) -> None:
        """Keep what was found, a value of JSON."""
        if not self._is_new:
            self._is_new = True
            atexit.register(self.save)
        self._found[key] = found

    def save(self) -> None:
        """Write the entries beside those of other processes; a folder that cannot be written is left."""
        # The newest last, so that what is dropped is the oldest.
        entries = list((self._read() | self._found).items())[-_MAX_ENTRIES:]
        with contextlib.suppress(OSError, StorageError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(dict(entries)))
        self._is_new = False

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@functools.cache
def code_cache() -> CodeCache:
    """The cache of this process's user."""
    return CodeCache(cache_folder() / _FILE)


def key_of(content: bytes, *about: str) -> str:
    """Hex SHA-256 of a file's content and of what else decides what is found in it."""
    return hashlib.sha256(b"\0".join((content, *(text.encode() for text in about)))).hexdigest()
