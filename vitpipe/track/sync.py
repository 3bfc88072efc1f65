"""Outboxes that wait to be sent: those that could not be, and those of stages that died.

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
from vitpipe.track.checked_json import DamagedError
from vitpipe.track.delivery import Delivery, to_stderr
from vitpipe.track.outbox import OUTBOX_FILE, Outbox
from vitpipe.track.refusal import NoAnswerError, TrackingError
from vitpipe.track.server import OFF

UNSENT_SUFFIX = ".unsent"
_STATE_OUTBOX = "track"
_FINISHED_FOLDER = "card.json"


def sync_pending(folder: Path) -> int:
    """Send every outbox below `folder` that still has something to say and that nobody else is sending.

    Runs whose process has died are marked KILLED. An outbox that a finished stage left behind (`*.unsent`)
    is removed when MLflow has all of it.

    Returns:
        How many outboxes were sent.

    Raises:
        TrackingError: MLflow does not answer or refuses; what the other outboxes had to say was sent.
    """
    return _send(outboxes_below(folder))


def sync_beside(own: Outbox) -> int:
    """Send what other stages left in the folder of outputs where a stage's outbox lies; as `sync_pending`."""
    outputs = own.folder.parent.parent
    found = (outbox for place in _folders(outputs) for outbox in outboxes_in(place))
    return _send(outbox for outbox in found if outbox.folder != own.folder)


def outboxes_below(folder: Path) -> Iterator[Outbox]:
    """All outboxes in `folder` (itself one, a state or an outbox, a folder of outputs, or several of those).

    Finished outputs, hidden folders and links are not looked into: they may hold millions of files.
    """
    if (folder / OUTBOX_FILE).is_file():
        yield Outbox(folder)
        return
    own = list(outboxes_in(folder))
    yield from own
    if own or (folder / _FINISHED_FOLDER).exists():
        return
    for place in _folders(folder):
        if place.name.startswith("."):
            yield from outboxes_in(place)
        else:
            yield from outboxes_below(place)


def outboxes_in(place: Path) -> Iterator[Outbox]:
    """The outboxes of one state folder or outbox; none when it is neither."""
    is_outbox = place.name.endswith(UNSENT_SUFFIX)
    if not is_outbox and not (place / _STATE_OUTBOX).is_dir() and not place.name.startswith("."):
        return
    for inner in _folders(place):
        is_outbox_there = (
            not inner.name.startswith(".") if is_outbox else inner.name.startswith(_STATE_OUTBOX)
        )
        if is_outbox_there and (inner / OUTBOX_FILE).is_file():
            yield Outbox(inner)


def keep_unsent(outbox: Outbox, place: Path) -> Path | None:
    """Copy an outbox that MLflow has not got all of to `place`, because its own folder is about to go.

    The copy is on the disk, and whole, before it has its name. One that was kept earlier goes only then,
    and only if nobody is sending it.

    Returns:
        The copy, or None when nothing is left to send.
    """
    if outbox.is_delivered():
        return None
    name, earlier = _id_of(outbox), sorted(place.glob(f"{_id_of(outbox)}*"))
    kept, number = place / name, 2
    while kept.exists():
        kept, number = place / f"{name}-{number}", number + 1
    aside = place / f".{kept.name}"
    with disk_errors(place):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(outbox.folder, aside)
        _force_to_disk(aside)
        aside.replace(kept)
        sync_folder(place)
    for old in earlier:
        with Outbox(old).locked(wait=False) as is_mine:
            if is_mine and _continues(Outbox(kept), Outbox(old)):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def _continues(later: Outbox, earlier: Outbox) -> bool:
    """Whether an outbox says all that an earlier copy of it says."""
    with contextlib.suppress(OSError):
        return later.journal.read_bytes().startswith(earlier.journal.read_bytes())
    return False


def _send(outboxes: Iterator[Outbox]) -> int:
    num_sent = 0
    failures: list[TrackingError] = []
    silent: set[str] = set()
    # Copies first: while an outbox has one that is not delivered, the outbox itself is left alone.
    for outbox in sorted(outboxes, key=lambda b: (not _is_left_behind(b), b.folder)):
        try:
            num_sent += _send_one(outbox, silent)
        except TrackingError as error:
            failures.append(error)
            if isinstance(error, NoAnswerError):
                silent.add(error.where)
        except DamagedError as error:
            to_stderr(
                f"{outbox.folder / OUTBOX_FILE} is damaged ({error}); "
                "its stage writes it anew when it runs again"
            )
        except OSError as error:  # somebody else's, or removed this moment
            to_stderr(f"{outbox.folder} cannot be sent: {error.strerror or error}")
    if failures:
        raise failures[0]
    return num_sent


def _send_one(outbox: Outbox, silent: set[str]) -> bool:
    """Send an outbox if that is for us to do, and MLflow is not known to be `silent`; whether it was sent."""
    is_kept, producer = _is_left_behind(outbox), outbox.producer()
    if not is_kept and (outbox.is_settled() or _has_copy(outbox) or outbox.may_be_filled()):
        return False
    with outbox.locked(wait=False) as is_mine:
        if not is_mine:
            return False
        delivery = Delivery(outbox)
        if delivery.store == OFF or str(delivery.store) in silent:
            return False
        delivery.sync()
        # Sending changes the outbox, so whether its process lives cannot be judged by its age any more.
        delivery.mark_killed(ended=producer)
        if is_kept and outbox.is_delivered():
            shutil.rmtree(outbox.folder)
    if is_kept:
        with contextlib.suppress(OSError):  # there is another one in it
            outbox.folder.parent.rmdir()
    return True


def _is_left_behind(outbox: Outbox) -> bool:
    return outbox.folder.parent.name.endswith(UNSENT_SUFFIX)


def _has_copy(outbox: Outbox) -> bool:
    """Whether a kept copy of this outbox waits to be sent: two senders of one run could repeat a point."""
    name = _id_of(outbox)
    return any(
        other.folder.name.startswith(name)
        for place in _folders(outbox.folder.parent.parent)
        if place.name.endswith(UNSENT_SUFFIX)
        for other in outboxes_in(place)
    )


def _id_of(outbox: Outbox) -> str:
    try:
        return outbox.origin().id
    except (OSError, DamagedError):
        sent = outbox.sent()
        return (sent.outbox if sent is not None else "") or "damaged"


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
