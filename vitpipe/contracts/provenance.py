"""Where an output comes from: its card, and the record of the run that made it.

The card is the same whenever the same inputs gave the same result. What two such runs differ in (times,
machine, run ids, measured speeds) lies in `run.json` and `run_history.csv`. DVC hashes neither (.dvcignore):
the same inputs give a folder of the same bytes, and a stage that ran again re-runs none behind it. A folder
that DVC has fetched has no record; all values are then unknown.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vitpipe.contracts.files import read_text, write_whole

CARD, RUN, RUN_HISTORY = "card.json", "run.json", "run_history.csv"
# Modification stamps of what a dataset was packed from, in its folder; see prepare/pack.py.
LISTING = "listing.json"
# Files that DVC does not hash. The patterns of .dvcignore are these names.
UNTRACKED = (RUN, RUN_HISTORY, LISTING)
# Names of numbers that measure the machine and the moment instead of the result.
_MEASURED = ("*_per_second", "*_seconds", "memory_gib")
# Beside the other keys, not among them: the checksums are over all the others.
CARD_CHECKSUM, _RUN_CHECKSUM = "card_sha256", "run_sha256"
# 2: checksums of the files and of the card itself. Cards of version 1 are read without them.
# 3: times, machine and run ids stand in run.json. Cards before it are read as a card and a record.
SCHEMA_VERSION = 3


class Card(BaseModel):
    """Provenance of one output folder.

    Digests are hex SHA-256, `parents` maps input name to card digest, `libraries` are those that its numbers
    depend on. `dataset` names the set that the stage has read, and so that its weights were trained on.
    `files` maps every tracked file of the folder to its digest; of a dataset's folder it has the
    manifest only, which holds the checksums of its shards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    recipe: str
    profile: str
    recipe_digest: str
    data_digest: str
    dataset: str = ""
    code_digest: str
    image: str
    identity: str
    parents: dict[str, str]
    seed: int
    libraries: dict[str, str]
    files: dict[str, str] = {}  # pydantic copies defaults, so {} is not shared


class RunRecord(BaseModel):
    """How and where a stage ran; every value is empty where it is not known.

    Attributes:
        card: digest of the card that it belongs to; a record beside another card is not used.
        git_commit: of the code, with `+changes` when code files differed from it.
        libraries: versions besides those on the card.
        wall_seconds: 0 where it is not known.
        notes: such as "trained in part with other code".
        metrics: the measured speeds among the stage's metrics.
        data_revisions: what DVC tracks (`prepared`, or a raw set) -> what it knows of it: `dvc_md5`, ...
        values: the recipe's, as `recorded.recorded_values` gives them.
        raw_data: set -> fingerprint of the user's files from which it was prepared.
    """

    # Unknown keys of a later version are no reason to lose the known ones.
    model_config = ConfigDict(frozen=True, extra="ignore")

    card: str = ""
    git_commit: str = ""
    libraries: dict[str, str] = {}  # pydantic copies defaults, so {} is not shared
    hardware: dict[str, str | int | float] = {}
    started_at: str = ""
    wall_seconds: float = 0.0
    tracking_run: str = ""
    notes: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    data_revisions: dict[str, dict[str, str]] = {}
    values: dict[str, Any] = {}
    raw_data: dict[str, str] = {}


def read_card(folder: Path) -> Card:
    """The card of a folder.

    Raises:
        OSError: when there is none.
        ValueError: when it is damaged, or of a later version.
    """
    return read_provenance(folder)[0]


def digest_of_card(card: Card) -> str:
    """Hex SHA-256 by which later stages and run.json name a card."""
    return checksum_of(card.model_dump(mode="json"))


def read_provenance(folder: Path) -> tuple[Card, RunRecord, str]:
    """Card and run record of a folder, and why the record is empty. Raises as `read_card`."""
    values = read_json(folder / CARD)
    if not isinstance(values, dict):
        raise ValueError("card.json is damaged: it holds no keys")
    # A later version may mean something else by the same key, so it is not guessed at.
    if values.get("schema_version", 0) not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(
            f"card.json has version {values.get('schema_version')}, this vitpipe reads 1 to {SCHEMA_VERSION}"
        )
    checksum = values.pop(CARD_CHECKSUM, None)
    if (checksum is not None or values["schema_version"] > 1) and checksum != checksum_of(values):
        raise ValueError("card.json is damaged, its checksum is not that of its content")
    if values["schema_version"] > 2:
        card = Card.model_validate(values)
        return card, *read_run_record(folder, digest_of_card(card))
    known = Card.model_fields
    card = Card.model_validate({key: value for key, value in values.items() if key in known})
    # Its libraries stand on the card.
    record = {key: value for key, value in values.items() if key not in known}
    return card, RunRecord.model_validate({**record, "card": digest_of_card(card)}), ""


def is_measured(name: str) -> bool:
    """Whether a metric measures time or memory, by its name: `images_per_second`, `train/memory_gib`."""
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _MEASURED)


def read_run_record(folder: Path, card: str = "") -> tuple[RunRecord, str]:
    """The record of a stage's output folder, and why it is not used.

    Args:
        card: digest of the folder's card; not compared when empty.

    Returns:
        The record, with nothing in it where there is none; and a reason, empty unless the file is damaged or
        of another run.
    """
    try:
        values = json.loads(read_text(folder / RUN))
        checksum = values.pop(_RUN_CHECKSUM)
        record = RunRecord.model_validate(values)
    except FileNotFoundError:
        return RunRecord(), ""
    # No error: the result is whole without it.
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ValidationError):
        return RunRecord(), f"{folder / RUN} is damaged and not used; times and versions are unknown"
    if checksum != checksum_of(values):
        return RunRecord(), f"{folder / RUN} has changed since it was written and is not used"
    # DVC leaves it in place when it checks out another result.
    if card and record.card != card:
        return RunRecord(), f"{folder / RUN} belongs to another result and is not used"
    return record, ""


def write_run_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json`.

    Raises:
        StorageError: when the disk refuses.
    """
    values = record.model_dump(mode="json")
    write_whole(folder / RUN, json.dumps({**values, _RUN_CHECKSUM: checksum_of(values)}, indent=2) + "\n")


def checksum_of(values: Mapping[str, Any]) -> str:
    """Hex SHA-256 over the values of a card or a record, in any order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parsed JSON of a file. Raises ValueError with the file's name when it is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{path.name} is damaged: {error}") from error
