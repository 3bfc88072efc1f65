"""Find and send pending outboxes: those that could not be sent, and those of stages that were killed.

Folders that may hold one, beside a stage's output NAME:

    .NAME.state/track              of a stage that runs, was stopped, or has finished
    .NAME.state.aside-*/track      moved aside because it did not fit; likewise .NAME.state/track.aside-*
    .NAME.unsent/ID                copy that is kept for MLflow after the state folder was removed
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vitpipe.contracts.artifact import CARD
from vitpipe.contracts.errors import disk_errors
from vitpipe.contracts.files import sync_folder
from vitpipe.track.checked_json import DamagedError
from vitpipe.track.delivery import Delivery, print_to_stderr
from vitpipe.track.mlflow_errors import NoAnswerError, TrackingError
from vitpipe.track.outbox import OUTBOX_FILE, OUTBOX_FOLDER, Outbox
from vitpipe.track.server import OFF

UNSENT_SUFFIX = ".unsent"


def sync_pending(folder: Path) -> int:
    """Send every outbox below `folder` that has undelivered records and that no other process is sending.

    Runs whose process was killed are marked KILLED. A kept copy (`*.unsent`) is removed once it is delivered.

    Returns:
        The number of outboxes that were sent.

    Raises:
        TrackingError: MLflow does not answer or rejects a request; raised after all outboxes were tried.
    """
    return _send_all(outboxes_below(folder))


def sync_beside(own: Outbox) -> int:
    """Send the outboxes of other stages beside the outbox `own`; otherwise as `sync_pending`."""
    outputs = own.folder.parent.parent  # own.folder is OUTPUTS/.STAGE.state/track
    found = (outbox for place in _subfolders(outputs) for outbox in outboxes_in(place))
    return _send_all(outbox for outbox in found if outbox.folder != own.folder)


def outboxes_below(folder: Path) -> Iterator[Outbox]:
    """All outboxes of `folder`: an outbox, a state or `.unsent` folder, or one with outputs at any depth.

    Finished outputs, other hidden folders and symbolic links are not searched.
    """
    if (folder / OUTBOX_FILE).is_file():
        yield Outbox(folder)
        return
    own = list(outboxes_in(folder))
    yield from own
    # A finished output (it has a card) may hold millions of files: prepared images, for example.
    if own or (folder / CARD).exists():
        return
    for place in _subfolders(folder):
        if place.name.startswith("."):
            yield from outboxes_in(place)
        else:
            yield from outboxes_below(place)


def outboxes_in(place: Path) -> Iterator[Outbox]:
    """The outboxes of one state folder or `.unsent` folder; none when it is neither."""
    is_unsent = place.name.endswith(UNSENT_SUFFIX)
    # A state folder is hidden, except where the user has named another one by `--state`.
    if not is_unsent and not (place / OUTBOX_FOLDER).is_dir() and not place.name.startswith("."):
        return
    for inner in _subfolders(place):
        # Hidden folders in `.unsent` are copies that were interrupted. In a state folder, `track.aside-*`
        # counts too.
        is_candidate = not inner.name.startswith(".") if is_unsent else inner.name.startswith(OUTBOX_FOLDER)
        if is_candidate and (inner / OUTBOX_FILE).is_file():
            yield Outbox(inner)


def keep_unsent(outbox: Outbox, place: Path) -> Path | None:
    """Copy an undelivered outbox into the folder `place`, because its own folder is about to be removed.

    An earlier copy is removed when the new one contains it and no process is sending it.

    Returns:
        The copy, or None when everything is delivered.

    Raises:
        StorageError: the disk refuses the write.
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
        # On the disk before the rename, and the original is removed only after both: a power cut at any
        # moment leaves one complete outbox.
        _force_to_disk(aside)
        aside.replace(kept)
        sync_folder(place)
    for old in earlier:
        with Outbox(old).locked(wait=False) as is_locked:
            if is_locked and _continues(Outbox(kept), Outbox(old)):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def _continues(later: Outbox, earlier: Outbox) -> bool:
    """Whether the journal of an outbox starts with the whole journal of an earlier copy."""
    # Not so when the state folder was lost and the stage started again; then the earlier copy holds other
    # points.
    with contextlib.suppress(OSError):
        return later.journal.read_bytes().startswith(earlier.journal.read_bytes())
    return False


def _send_all(outboxes: Iterator[Outbox]) -> int:
    num_sent = 0
    failures: list[TrackingError] = []
    unreachable: set[str] = set()
    # Kept copies first: `_send_one` skips an outbox while a copy of it is undelivered.
    for outbox in sorted(outboxes, key=lambda b: (not _is_kept_copy(b), b.folder)):
        try:
            num_sent += _send_one(outbox, unreachable)
        except TrackingError as error:
            failures.append(error)
            if isinstance(error, NoAnswerError):
                unreachable.add(error.where)
        except DamagedError as error:
            print_to_stderr(
                f"{outbox.folder / OUTBOX_FILE} is damaged ({error}); "
                "its stage writes it again when it is run again"
            )
        except OSError as error:  # it belongs to another user, or was removed meanwhile
            print_to_stderr(f"{outbox.folder} cannot be sent: {error.strerror or error}")
    if failures:
        raise failures[0]
    return num_sent


def _send_one(outbox: Outbox, unreachable: set[str]) -> bool:
    """Send an outbox if it is undelivered, its stage is not alive, and its address is not in `unreachable`.

    Returns:
        Whether it was sent.
    """
    is_copy, producer = _is_kept_copy(outbox), outbox.producer()
    if not is_copy and (outbox.is_settled() or _has_kept_copy(outbox) or outbox.may_have_live_producer()):
        return False
    with outbox.locked(wait=False) as is_locked:
        if not is_locked:
            return False
        delivery = Delivery(outbox)
        # A timeout per outbox would add up when many wait for the same server.
        if delivery.address == OFF or str(delivery.address) in unreachable:
            return False
        delivery.sync()
        # Sending has changed the folder's modification time, so its age no longer shows that the producer is
        # dead; that was checked above.
        delivery.mark_killed(ended=producer)
        if is_copy and outbox.is_delivered():
            shutil.rmtree(outbox.folder)
    if is_copy:
        with contextlib.suppress(OSError):  # not empty: another copy is in it
            outbox.folder.parent.rmdir()
    return True


def _is_kept_copy(outbox: Outbox) -> bool:
    return outbox.folder.parent.name.endswith(UNSENT_SUFFIX)


def _has_kept_copy(outbox: Outbox) -> bool:
    """Whether a kept copy of this outbox is pending."""
    # Two processes that send to the same run do not see each other's points and could send one twice.
    name = _id_of(outbox)
    return any(
        other.folder.name.startswith(name)
        for place in _subfolders(outbox.folder.parent.parent)
        if place.name.endswith(UNSENT_SUFFIX)
        for other in outboxes_in(place)
    )


def _id_of(outbox: Outbox) -> str:
    try:
        return outbox.origin().id
    except (OSError, DamagedError):
        sent = outbox.sent()
        return (sent.outbox if sent is not None else "") or "damaged"


def _subfolders(place: Path) -> list[Path]:
    """The folders in a folder, sorted, without symbolic links; none when it cannot be read."""
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
