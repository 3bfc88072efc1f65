"""What runs leave behind: states and outboxes moved aside, last states, folders of killed stages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpipe.contracts.artifact import CARD, is_being_written, is_marked
from vitpipe.contracts.errors import some
from vitpipe.contracts.files import remove, size_bytes
from vitpipe.stages.folder_lock import holder_of
from vitpipe.stages.resume import FINISHED, STATES, is_state, own_entries, remove_state
from vitpipe.track.outbox import OUTBOX_FILE

# NAME.aside-DATE-TIME-REASON, see `files.move_aside`.
_ASIDE = re.compile(r"\.aside-\d{8}-\d{6}-([a-z0-9-]+)$")
# Reasons for moving aside what holds files of the user: edited outputs, and what lay at the place of a
# pulled dataset or of packing scratch.
_USERS_CONTENT = ("changed-since-written", "no-dataset-of-vitpipe", "not-of-vitpipe")


@dataclass(frozen=True)
class Leftover:
    """A file or folder that could be removed.

    Attributes:
        reason: why it exists, as text.
        is_needed: its content exists nowhere else; removed only when it is named itself.
    """

    path: Path
    size_bytes: int
    reason: str
    is_needed: bool


def leftovers(root: Path) -> list[Leftover]:
    """All leftovers below `root`, or `root` itself, sorted by path. Finished outputs are not searched."""
    return sorted(_found(root.absolute()), key=lambda item: item.path)


def clear(items: list[Leftover], root: Path) -> list[Leftover]:
    """Remove what is not needed, and `root` itself where it is a leftover; a running stage keeps its folders.

    Returns:
        The removed ones.
    """
    removed = []
    for item in items:
        if not holder_of(item.path) and (not item.is_needed or item.path == root.absolute()):
            if is_state(item.path) and not item.is_needed:
                remove_state(item.path)
            else:
                remove(item.path)
            removed.append(item)
    return removed


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
    """Why a folder exists, and whether it is needed; None for a folder that is not ours."""
    name = folder.name
    if folder.is_symlink():
        return None
    if moved := _ASIDE.search(name):
        return _moved_aside(folder, moved[1])
    if name.startswith(".") and name.endswith(".unsent"):
        return "not delivered to MLflow yet: `vitpipe sync` sends it", True
    if name.startswith(".") and name.endswith((".partial", ".replaced")):
        is_ours = is_being_written(folder) or is_marked(folder)
        return ("left by a killed stage", False) if is_ours else None
    if not name.startswith(".") or not is_state(folder):
        return None
    return _with_foreign_files(folder, *_state_reason(folder))


def _moved_aside(folder: Path, reason: str) -> tuple[str, bool] | None:
    """States and outboxes can be removed; folders that hold files of the user's only when they are named."""
    said = f"moved aside: {reason.replace('-', ' ')}"
    if is_state(folder):
        return _with_foreign_files(folder, said, False)
    if (folder / OUTBOX_FILE).is_file():
        return said, False
    return (said, True) if reason in _USERS_CONTENT else None


def _state_reason(folder: Path) -> tuple[str, bool]:
    if (folder / FINISHED).is_file():
        return "last state of a finished stage; no later stage has read its output yet", False
    if any(folder.glob(STATES)):
        return "unfinished: the stage resumes from it", True
    return "started, without a saved state", False


def _with_foreign_files(folder: Path, reason: str, is_needed: bool) -> tuple[str, bool]:
    foreign = sorted(set(folder.iterdir()) - set(own_entries(folder)))
    if not foreign:
        return reason, is_needed
    return f"{reason}; holds files that vitpipe has not written ({some([f.name for f in foreign])})", True
