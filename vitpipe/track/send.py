"""Boxes that wait to be sent: those that could not be, and those of stages that died.

Folders that may hold one, beside a stage's output NAME:

    .NAME.state/track              of a stage that runs, was stopped, or has finished
    .NAME.state.aside-*/track      moved aside because it did not fit; likewise .NAME.state/track.aside-*
    .NAME.unsent/ID                kept for MLflow when the state folder had to go
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vitpipe.contracts.errors import disk_errors
from vitpipe.contracts.files import sync_folder
from vitpipe.track.box import BOX, Box
from vitpipe.track.delivery import Delivery, to_stderr
from vitpipe.track.refusal import SilentError, StoreError
from vitpipe.track.sealed import DamagedError
from vitpipe.track.store import OFF

UNSENT_SUFFIX = ".unsent"
_STATE_BOX = "track"
_FINISHED_FOLDER = "card.json"


def send_pending(folder: Path) -> int:
    """Send every box below `folder` that still has something to say and that nobody else is sending.

    Runs whose process has died are marked KILLED. A box that a finished stage left behind (`*.unsent`)
    is removed when MLflow has all of it.

    Returns:
        How many boxes were sent.

    Raises:
        StoreError: MLflow does not answer or refuses; what the other boxes had to say was sent.
    """
    return _send(boxes_below(folder))


def send_beside(own: Box) -> int:
    """Send what other stages left in the folder of outputs where a stage's box lies; as `send_pending`."""
    outputs = own.folder.parent.parent
    found = (box for place in _folders(outputs) for box in boxes_in(place))
    return _send(box for box in found if box.folder != own.folder)


def boxes_below(folder: Path) -> Iterator[Box]:
    """All boxes in `folder` (itself one, a state or an outbox, a folder of outputs, or several of those).

    Finished outputs, hidden folders and links are not looked into: they may hold millions of files.
    """
    if (folder / BOX).is_file():
        yield Box(folder)
        return
    own = list(boxes_in(folder))
    yield from own
    if own or (folder / _FINISHED_FOLDER).exists():
        return
    for place in _folders(folder):
        if place.name.startswith("."):
            yield from boxes_in(place)
        else:
            yield from boxes_below(place)


def boxes_in(place: Path) -> Iterator[Box]:
    """The boxes of one state folder or outbox; none when it is neither."""
    is_outbox = place.name.endswith(UNSENT_SUFFIX)
    if not is_outbox and not (place / _STATE_BOX).is_dir() and not place.name.startswith("."):
        return
    for inner in _folders(place):
        is_box = not inner.name.startswith(".") if is_outbox else inner.name.startswith(_STATE_BOX)
        if is_box and (inner / BOX).is_file():
            yield Box(inner)


def keep_unsent(box: Box, place: Path) -> Path | None:
    """Copy a box that MLflow has not got all of to `place`, because its own folder is about to go.

    The copy is on the disk, and whole, before it has its name. One that was kept earlier goes only then,
    and only if nobody is sending it.

    Returns:
        The copy, or None when nothing is left to send.
    """
    if box.is_delivered():
        return None
    name, earlier = _id_of(box), sorted(place.glob(f"{_id_of(box)}*"))
    kept, number = place / name, 2
    while kept.exists():
        kept, number = place / f"{name}-{number}", number + 1
    aside = place / f".{kept.name}"
    with disk_errors(place):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(box.folder, aside)
        _force_to_disk(aside)
        aside.replace(kept)
        sync_folder(place)
    for old in earlier:
        with Box(old).locked(wait=False) as is_mine:
            if is_mine and _continues(Box(kept), Box(old)):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def _continues(later: Box, earlier: Box) -> bool:
    """Whether a box says all that an earlier copy of it says."""
    with contextlib.suppress(OSError):
        return later.journal.read_bytes().startswith(earlier.journal.read_bytes())
    return False


def _send(boxes: Iterator[Box]) -> int:
    num_sent = 0
    failures: list[StoreError] = []
    silent: set[str] = set()
    # Copies first: while a box has one that is not delivered, the box itself is left alone.
    for box in sorted(boxes, key=lambda b: (not _is_left_behind(b), b.folder)):
        try:
            num_sent += _send_one(box, silent)
        except StoreError as error:
            failures.append(error)
            if isinstance(error, SilentError):
                silent.add(error.where)
        except DamagedError as error:
            to_stderr(f"{box.folder / BOX} is damaged ({error}); its stage writes it anew when it runs again")
        except OSError as error:  # somebody else's, or removed this moment
            to_stderr(f"{box.folder} cannot be sent: {error.strerror or error}")
    if failures:
        raise failures[0]
    return num_sent


def _send_one(box: Box, silent: set[str]) -> bool:
    """Send a box if that is for us to do, and MLflow is not known to be `silent`; whether it was sent."""
    is_kept, speaker = _is_left_behind(box), box.speaker()
    if not is_kept and (box.is_settled() or _has_copy(box) or box.may_be_filled()):
        return False
    with box.locked(wait=False) as is_mine:
        if not is_mine:
            return False
        delivery = Delivery(box)
        if delivery.store == OFF or str(delivery.store) in silent:
            return False
        delivery.sync()
        # Sending changes the box, so whether its process lives cannot be judged by its age any more.
        delivery.mark_killed(ended=speaker)
        if is_kept and box.is_delivered():
            shutil.rmtree(box.folder)
    if is_kept:
        with contextlib.suppress(OSError):  # there is another one in it
            box.folder.parent.rmdir()
    return True


def _is_left_behind(box: Box) -> bool:
    return box.folder.parent.name.endswith(UNSENT_SUFFIX)


def _has_copy(box: Box) -> bool:
    """Whether a kept copy of this box waits to be sent: two senders of one run could repeat a point."""
    name = _id_of(box)
    return any(
        other.folder.name.startswith(name)
        for place in _folders(box.folder.parent.parent)
        if place.name.endswith(UNSENT_SUFFIX)
        for other in boxes_in(place)
    )


def _id_of(box: Box) -> str:
    try:
        return box.origin().id
    except (OSError, DamagedError):
        sent = box.sent()
        return (sent.box if sent is not None else "") or "damaged"


def _folders(place: Path) -> list[Path]:
    """The folders in a folder, in order, without links; none when it cannot be read."""
    try:
        with os.scandir(place) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _force_to_disk(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
