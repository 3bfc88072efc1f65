"""Which saved state a stage goes on from.

What decides the weights (recipe values that act on them, data, starting weights) has to be the same. Code and
libraries may have changed since: that is said and written on the card, and is no reason to lose days of
training. What does not fit is moved aside with the reason in its name; nothing is removed before its result
is secured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import Artifact, Card, open_artifact
from vitpipe.contracts.errors import ArtifactError, VitpipeError, disk_errors
from vitpipe.contracts.files import move_aside, remove, write_whole
from vitpipe.track.stage_run import OUTBOX_FOLDER

MARK, FINISHED, STATES = "identity.json", "finished.json", "state-*.pt"
_VERSION, _CHECKSUM = 2, "mark_sha256"
_REASONS = {
    "stage": "other-stage",
    "recipe": "other-recipe-values",
    "data": "other-data",
    "weights": "other-starting-weights",
    "inputs": "other-inputs",
}


@dataclass(frozen=True)
class Claim:
    """What became of a state folder: lines for the person who watches, and notes for the card."""

    said: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def claim_state(state: Path, decides: Mapping[str, str], recorded: Mapping[str, Any], out: Path) -> Claim:
    """Make a state folder this work's, keeping what is in it if it is the same work; the caller owns its
    lock.

    Args:
        decides: as `decided.deciding`.
        recorded: `code_digest` and `libraries` of the present code.
        out: the output folder, for a state whose stage had finished.

    Raises:
        ArtifactError: the folder is not ours.
    """
    claim = Claim()
    with disk_errors(state):
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
    """The output is in place: of the state, what could make it again stays until a later stage has read it.

    That is the last training state and what the tracker knows; a stage without training states keeps nothing.
    """
    newest = max(state.glob(STATES), default=None)  # steps have leading zeros
    if newest is None:
        remove(state)
        return
    for place in state.iterdir():
        if place not in (newest, state / MARK, state / OUTBOX_FOLDER):
            remove(place)
    write_whole(state / FINISHED, json.dumps({"card": digest_of(card), "stage": card.stage}) + "\n")


def release_states(inputs: Mapping[str, Artifact], state: Path) -> None:
    """Remove the states of finished stages whose outputs these are, once those have been read and are sound.

    They lie beside the outputs, or beside this stage's own state folder.
    """
    for artifact in inputs.values():
        folder = artifact.path.resolve()
        beside = [folder.with_name(f".{folder.name}.state")]
        if state.parent.is_dir():
            beside += [place for place in state.parent.iterdir() if (place / FINISHED).is_file()]
        for place in dict.fromkeys(beside):
            if place != state and _finished_card(place) == digest_of(artifact.card):
                artifact.verify()
                _release(place)


def _release(place: Path) -> None:
    from vitpipe.track.outbox import Outbox
    from vitpipe.track.sync import UNSENT_SUFFIX, keep_unsent

    outbox = Outbox(place / OUTBOX_FOLDER)
    if outbox.journal.is_file() and not outbox.is_delivered():
        keep_unsent(outbox, place.parent / f"{place.stem}{UNSENT_SUFFIX}")
    remove(place)


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
    differing = [_REASONS.get(key, key) for key in decides if mark.decides.get(key) != decides[key]]
    if differing == [_REASONS["recipe"]] and decides["stage"] == "prepare":
        # Packed shards know by themselves what they were packed from; only the tracker's run is another one.
        outbox = state / OUTBOX_FOLDER
        return _moved(outbox, differing[0]) if outbox.exists() else Claim()
    if differing:
        return _moved(state, "-and-".join(differing))
    changes = _changes(mark.recorded, recorded)
    if not changes or not any(state.glob(STATES)):
        return Claim(notes=mark.notes)
    if finished := _finished_card(state):
        # The stage had ended. To take its weights for what the present code makes would be untrue.
        if not _is_sound(out, finished):
            return _moved(state, "finished-by-other-code")
        _release(state)
        return Claim()
    what = ", ".join(changes)
    return Claim(
        (f"The saved state was made with other {what}; training goes on from it",),
        (*mark.notes, f"trained in part with other {what}"),
    )


def _read_mark(state: Path) -> _Mark | str:
    """The mark of a state folder, or the reason why it is of no use.

    Raises:
        ArtifactError: the folder is not a state folder at all.
    """
    is_ours = any(state.glob(STATES)) or (state / OUTBOX_FOLDER / "box.json").is_file()
    try:
        values = json.loads((state / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if is_ours or (state / MARK).is_file():
            return "damaged-identity"
        names = ", ".join(sorted(path.name for path in state.iterdir())[:3])
        raise ArtifactError(
            f"--state holds files that vitpipe has not written ({names}); nothing was touched",
            where=state,
            fix="choose another --state, or move these files away",
        ) from None
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        return "another-version"
    if values.pop(_CHECKSUM, None) != digest_of(values):
        return "damaged-identity"
    try:
        return _Mark(dict(values["decides"]), dict(values["recorded"]), tuple(values.get("notes", ())))
    except (KeyError, TypeError, ValueError):
        return "damaged-identity"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the code that saved a state and the present one, in words."""
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
