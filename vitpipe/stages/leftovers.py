"""What runs leave behind on purpose: states and outboxes that were moved aside, last states, dead folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpipe.contracts.artifact import CARD, is_being_written, is_marked
from vitpipe.contracts.files import remove, size_bytes
from vitpipe.stages.folder_lock import holder_of
from vitpipe.stages.resume import FINISHED, MARK, STATES

_ASIDE = ".aside-"


@dataclass(frozen=True)
class Leftover:
    """One thing that could go.

    Attributes:
        reason: why it is there, for people.
        is_needed: it holds something that exists nowhere else; it goes only when it is named itself.
    """

    path: Path
    size_bytes: int
    reason: str
    is_needed: bool


def leftovers(root: Path) -> list[Leftover]:
    """All that lies below `root`, or `root` itself, sorted by path. Finished outputs are not looked into."""
    return sorted(_found(root.absolute()), key=lambda item: item.path)


def clear(items: list[Leftover], root: Path) -> list[Leftover]:
    """Remove what is not needed, and what `root` names itself; what a running stage owns stays.

    Returns:
        What was removed.
    """
    gone = []
    for item in items:
        if not holder_of(item.path) and (not item.is_needed or item.path == root.absolute()):
            remove(item.path)
            gone.append(item)
    return gone


def _found(folder: Path) -> Iterator[Leftover]:
    if (found := _what(folder)) is not None:
        yield Leftover(folder, size_bytes(folder), *found)
        return
    if not folder.is_dir() or folder.is_symlink() or (folder / CARD).is_file():
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _found(Path(entry.path))


def _what(folder: Path) -> tuple[str, bool] | None:
    """Why a folder is there, and whether it is needed; None when it is nothing of ours."""
    name = folder.name
    if _ASIDE in name and name.startswith("."):
        reason = name.partition(_ASIDE)[2].partition("-")[2].partition("-")[2]
        return f"moved aside: {reason.replace('-', ' ')}", False
    if name.startswith(".") and name.endswith(".unsent"):
        return "MLflow has not got these points: `vitpipe send` sends them", True
    if name.startswith(".") and name.endswith((".partial", ".replaced")):
        is_ours = is_being_written(folder) or is_marked(folder)
        return ("left by a killed stage", False) if is_ours else None
    if not (folder / MARK).is_file() or not name.startswith("."):
        return None
    if (folder / FINISHED).is_file():
        return "last state of a finished stage whose output no later stage has read yet", False
    if any(folder.glob(STATES)):
        return "unfinished: the stage goes on from it", True
    return "begun, without a saved state", False
