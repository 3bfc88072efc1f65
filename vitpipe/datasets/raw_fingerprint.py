"""A cheap fingerprint of the user's files: names, sizes and modification times below each set's folder.

By it `vitpipe plan` and `dvc repro` notice an image that was added, removed or changed. Nothing is read.
Files that were restored with other times, by a copy or by `dvc checkout`, count as changed: prepare then runs
again, gives the same bytes, and the stages behind it are skipped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.datasets.catalogue import facts
from vitpipe.datasets.sources.detect_format import folder_of

ABSENT = "absent"


def raw_fingerprints(data: DataConfig) -> dict[str, str]:
    """Set -> fingerprint of its folder, for the sets of the recipe; empty unless `data.source` is `folders`.

    A folder that does not exist is `absent`: planning needs no data.
    """
    if data.source != "folders":
        return {}
    # Several sets may lie in one folder: ImageNet-100 is a part of ImageNet.
    folders = {name: folder_of(data.root, facts(name, data)) if data.root else None for name in data.names}
    known = {folder: fingerprint(folder) if folder else ABSENT for folder in set(folders.values())}
    return {name: known[folder] for name, folder in folders.items()}


def fingerprint(folder: Path) -> str:
    """Hex digest over the files below a folder, links followed; `absent` when there is no folder.

    Hidden files do not count: file browsers and rsync write them, and the readers ignore them.
    """
    if not folder.is_dir():
        return ABSENT
    total = hashlib.blake2b(digest_size=16)
    for line in _lines(str(folder), "", frozenset()):
        total.update(line)
    return total.hexdigest()


def _lines(folder: str, inside: str, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    """One line per file, sorted by name within each folder."""
    try:
        status = Path(folder).stat()
        with os.scandir(folder) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        # The stage itself names the folder that it cannot read.
        yield _line(inside, f"unreadable {error.errno}")
        return
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that it lies in
        return
    for entry in found:
        name = f"{inside}/{entry.name}"
        try:
            if entry.is_dir():
                yield from _lines(entry.path, name, above | {here})
                continue
            file = entry.stat()
        except OSError as error:  # a link to nowhere, or removed in between
            yield _line(name, f"unreadable {error.errno}")
            continue
        yield _line(name, f"{file.st_size} {file.st_mtime_ns}")


def _line(name: str, content: str) -> bytes:
    # File names on Linux are bytes; Python decodes invalid UTF-8 to surrogates.
    return f"{name}\0{content}\n".encode(errors="surrogateescape")
