"""Which saved state a stage resumes from.

The recipe values that act on the weights, the data and the starting weights have to be the same. Code and
libraries may have changed since: that is printed and recorded on the card, and no reason to lose days of
training. A state that does not fit is moved aside with the reason in its name; none is removed before its
result is secured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import Artifact, Card, open_artifact
from vitpipe.contracts.errors import ArtifactError, VitpipeError, disk_errors, some
from vitpipe.contracts.files import move_aside, remove, write_whole
from vitpipe.track.outbox import OUTBOX_FOLDER

MARK, FINISHED, STATES = "identity.json", "finished.json", "state-*.pt"
_VERSION, _CHECKSUM = 2, "mark_sha256"
# Names in a state folder: marks and states (and what a kill leaves of them), batches of a diverged step, the
# outbox, the scratch folders of prepare (raw, pack) and of the dense stages (data).
_OWN = re.compile(
    r"\.?(identity|finished)(\.[0-9-]+)?\.json|(state|diverged)-.+\.pt|saving\.partial|mmengine"
    r"|(track|data|raw|pack)(\.aside-.+)?"
)
# Earlier versions trained dense stages by mmengine, whose log lay in a folder `mmengine` or one named by the
# time.
_EARLIER_LOGS, _LOG = re.compile(r"\d{8}_\d{6}"), "mmengine.log"
_REASONS = {
    "stage": "other-stage",
    "recipe": "other-recipe-values",
    "data": "other-data",
    "weights": "other-starting-weights",
    "inputs": "other-inputs",
    "method.teacher.file": "another-teacher",
}


@dataclass(frozen=True)
class Claim:
    """How a state folder was claimed: messages for the terminal, and notes for the card."""

    messages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def claim_state(state: Path, decides: Mapping[str, str], recorded: Mapping[str, Any], out: Path) -> Claim:
    """Claim a state folder for this run, and keep its content if it belongs to the same training.

    The caller holds the folder's lock.

    Args:
        decides: as `weights_identity`.
        recorded: `code_digest` and `libraries` of the present code.
        out: the output folder, for a state whose stage had finished.

    Raises:
        ArtifactError: the folder is not ours.
    """
    claim = Claim()
    with disk_errors(state):
        if state.is_dir() and all(map(_is_earlier_log, state.iterdir())):
            remove_state(state)  # all that earlier versions have left of a released state
        if state.is_dir() and any(state.iterdir()):
            claim = _keep_or_move(state, decides, recorded, out)
        state.mkdir(parents=True, exist_ok=True)
    (state / FINISHED).unlink(missing_ok=True)
    mark = {
        "version": _VERSION,
        "decides": dict(decides),
        "recorded": dict(recorded),
        "notes": list(claim.notes),
    }
    write_whole(state / MARK, json.dumps({**mark, _CHECKSUM: digest_of(mark)}, indent=2) + "\n")
    return claim


def mark_finished(state: Path, card: Card) -> None:
    """Reduce the state of a finished stage to its last one, from which the output could be written again.

    That is the last training state and what the tracker knows; a stage without training states keeps nothing.
    """
    newest = max(state.glob(STATES), default=None)  # by name: steps have leading zeros
    if newest is None:
        remove_state(state)
        return
    for place in own_entries(state):
        if place not in (newest, state / MARK, state / OUTBOX_FOLDER):
            remove(place)
    write_whole(state / FINISHED, json.dumps({"card": digest_of(card), "stage": card.stage}) + "\n")


def release_states(inputs: Mapping[str, Artifact], state: Path) -> None:
    """Remove the states that made these inputs, after verifying the inputs' checksums.

    The states lie beside the outputs, or beside this stage's own state folder.
    """
    for artifact in inputs.values():
        folder = artifact.path.resolve()
        # Beside the output, where a state lies by default, and beside our own, where --state put it.
        beside = [folder.with_name(f".{folder.name}.state")]
        if state.parent.is_dir():
            beside += [place for place in state.parent.iterdir() if (place / FINISHED).is_file()]
        for place in dict.fromkeys(beside):
            if place != state and _finished_card(place) == digest_of(artifact.card):
                artifact.verify()
                # Stages that follow the same one begin at the same moment: another has released it.
                with suppress(FileNotFoundError):
                    _release(place)


def _release(place: Path) -> None:
    from vitpipe.track.outbox import Outbox
    from vitpipe.track.sync import UNSENT_SUFFIX, keep_unsent

    # Points that MLflow has not got survive the state.
    outbox = Outbox(place / OUTBOX_FOLDER)
    if outbox.journal.is_file() and not outbox.is_delivered():
        keep_unsent(outbox, place.parent / f"{place.stem}{UNSENT_SUFFIX}")
    remove_state(place)


def is_state(folder: Path) -> bool:
    """Whether a folder is a training state's: it has a mark of ours, or saved states."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    try:
        _read_mark(folder)
    except ArtifactError:
        return False
    return True


def own_entries(state: Path) -> list[Path]:
    """What vitpipe has written into a state folder; anything else in it is the user's."""
    return [place for place in state.iterdir() if _OWN.fullmatch(place.name) or _is_earlier_log(place)]


def _is_earlier_log(place: Path) -> bool:
    named = _EARLIER_LOGS.fullmatch(place.name) is not None and place.is_dir()
    return named and {inner.name for inner in place.iterdir()} <= {_LOG, "vis_data"}


def remove_state(state: Path) -> None:
    """Remove a state folder, except for files in it that vitpipe has not written.

    Another process may do the same meanwhile.
    """
    for place in own_entries(state):
        remove(place)
    with suppress(FileNotFoundError):
        if not any(state.iterdir()):
            state.rmdir()


def _finished_card(state: Path) -> str:
    try:
        return str(json.loads((state / FINISHED).read_text(encoding="utf-8"))["card"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@dataclass(frozen=True)
class _Mark:
    decides: dict[str, str]
    recorded: dict[str, Any]
    notes: tuple[str, ...]


def _keep_or_move(state: Path, decides: Mapping[str, str], recorded: Mapping[str, Any], out: Path) -> Claim:
    mark = _read_mark(state)
    if isinstance(mark, str):
        return _moved(state, mark)
    # Every difference is named, so that the folder's name tells what to change back.
    differing = [_REASONS.get(key, key) for key in decides if mark.decides.get(key) != decides[key]]
    if differing == [_REASONS["recipe"]] and decides["stage"] == "prepare":
        # Half-packed shards record what they were packed from and are checked there; only the MLflow run of
        # the other recipe values has to stay apart.
        outbox = state / OUTBOX_FOLDER
        return _moved(outbox, differing[0]) if outbox.exists() else Claim()
    if differing:
        return _moved(state, "-and-".join(differing))
    changes = _changes(mark.recorded, recorded)
    if not changes or not any(state.glob(STATES)):
        return Claim(notes=mark.notes)
    if finished := _finished_card(state):
        # The stage had finished. Writing its output again would put the present code's digest on a card of
        # weights that other code has trained.
        if not _is_sound(out, finished):
            return _moved(state, "finished-by-other-code")
        _release(state)
        return Claim()
    what = ", ".join(changes)
    return Claim(
        (f"The saved state was made with other {what}; training resumes from it",),
        (*mark.notes, f"trained in part with other {what}"),
    )


def _read_mark(state: Path) -> _Mark | str:
    """The mark of a state folder, or the reason why it cannot be used.

    Raises:
        ArtifactError: the folder is not a state folder at all.
    """
    # Without a readable mark, states, an outbox or a batch that diverged still prove whose folder it is.
    is_ours = any(state.glob(STATES)) or (state / OUTBOX_FOLDER / "box.json").is_file()
    is_ours = is_ours or any(state.glob("diverged-*.pt"))
    try:
        values = json.loads((state / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if is_ours or (state / MARK).is_file():
            return "damaged-identity"
        raise _foreign_state(state) from None
    # The first version of the mark was one digest, in quotes.
    is_old = isinstance(values, str) and len(values) == 64
    if not is_ours and not is_old and not (isinstance(values, dict) and "version" in values):
        raise _foreign_state(state)
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        return "another-version"
    if values.pop(_CHECKSUM, None) != digest_of(values):
        return "damaged-identity"
    try:
        return _Mark(dict(values["decides"]), dict(values["recorded"]), tuple(values.get("notes", ())))
    except (KeyError, TypeError, ValueError):
        return "damaged-identity"


def _foreign_state(state: Path) -> ArtifactError:
    names = some(sorted(path.name for path in state.iterdir()))
    return ArtifactError(
        f"--state holds files that vitpipe has not written ({names}); nothing was touched",
        where=state,
        fix="choose another --state, or move these files away",
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between the code that saved a state and the present one, as text."""
    changes = []
    if before.get("code_digest") != now.get("code_digest"):
        changes.append(
            f"code ({str(before.get('code_digest'))[:12]}, now {str(now.get('code_digest'))[:12]})"
        )
    old, new = before.get("libraries") or {}, now.get("libraries") or {}
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            changes.append(f"{name} ({old.get(name, 'absent')}, now {new.get(name, 'absent')})")
    return changes


def _is_sound(out: Path, card_digest: str) -> bool:
    try:
        artifact = open_artifact(out)
        artifact.verify()
    except VitpipeError:
        return False
    return digest_of(artifact.card) == card_digest


def _moved(place: Path, reason: str) -> Claim:
    after = move_aside(place, reason)
    return Claim(
        (
            f"{place.name} does not fit this run ({reason.replace('-', ' ')}) and was moved to {after}; "
            "`vitpipe clean` lists what was moved aside",
        )
    )
