"""A stage's output folder: written aside, renamed when complete, always with its card.

Layout of every folder (design: section 3, "Stage"):

    card.json        who made it, from what, with what
    metrics.json     flat name -> number
    tables/*.csv     one file per table
    weights.safetensors and others, by stage
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vitpipe.errors import ArtifactError, disk_errors

SCHEMA_VERSION = 1
CARD, METRICS, TABLES, WEIGHTS = "card.json", "metrics.json", "tables", "weights.safetensors"


class Card(BaseModel):
    """Provenance of one output folder.

    Digests are hex SHA-256, `parents` maps input name to card digest, `data_revisions` maps what
    DVC tracks (`prepared`, or a raw set) to what it knows of it: `dvc_md5`, `dvc_commit`, ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    recipe: str
    profile: str
    recipe_digest: str
    data_digest: str
    data_revisions: dict[str, dict[str, str]] = {}  # pydantic copies defaults
    code_digest: str
    image: str
    identity: str
    parents: dict[str, str]
    seed: int
    git_commit: str
    libraries: dict[str, str]
    hardware: dict[str, str | int | float]
    started_at: str
    wall_seconds: float
    tracking_run: str = ""
    notes: tuple[str, ...] = ()


class Artifact:
    """A finished output folder, opened for reading."""

    def __init__(self, path: Path, card: Card, metrics: dict[str, float]) -> None:
        self.path, self.card, self.metrics = path, card, metrics

    @property
    def weights(self) -> Path:
        """Path of `weights.safetensors`.

        Raises:
            ArtifactError: when this stage made no weights.
        """
        path = self.path / WEIGHTS
        if not path.is_file():
            raise ArtifactError(
                f"The output of stage '{self.card.stage}' holds no weights",
                where=path,
                mend="give the folder of a stage that trains a model: pretrain, intermediate, finetune",
            )
        return path

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """All tables as name -> rows; every cell is text as in the CSV file."""
        found: dict[str, list[dict[str, str]]] = {}
        for file in sorted((self.path / TABLES).glob("*.csv")):
            with file.open(newline="", encoding="utf-8") as handle:
                found[file.stem] = list(csv.DictReader(handle))
        return found


def open_artifact(path: Path, stage: str | None = None) -> Artifact:
    """Open a finished output folder.

    Args:
        path: the folder.
        stage: when given, the stage that must have made it.

    Raises:
        ArtifactError: when the folder is missing, incomplete, damaged or of another stage.
    """
    if not path.is_dir():
        raise ArtifactError(
            "The input folder does not exist",
            where=path,
            mend=f"run the stage that makes it first{f' (vitpipe run {stage} ...)' if stage else ''}, "
            "or let `dvc repro` run the chain in order",
        )
    try:
        card = Card.model_validate_json((path / CARD).read_bytes())
        metrics = json.loads((path / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"The folder is not a finished stage output ({type(error).__name__})",
            where=path,
            mend="delete it and run its stage again",
        ) from error
    if stage is not None and card.stage != stage:
        raise ArtifactError(
            f"The folder was made by stage '{card.stage}', but '{stage}' is needed here",
            where=path,
            mend="check the order of the --in NAME=DIR arguments",
        )
    return Artifact(path, card, metrics)


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; rename it to `out` on success, delete it on any failure.

    An `out` that exists already is replaced at the moment of the rename, not before.

    Raises:
        StorageError: when the disk is full or read-only.
    """
    partial = out.parent / f".{out.name}.partial"
    with disk_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            replaced = out.parent / f".{out.name}.replaced"
            if out.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                out.replace(replaced)
            partial.replace(out)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_card(folder: Path, card: Card) -> None:
    """Write `card.json`."""
    (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write `metrics.json`: flat, sorted, numbers only."""
    flat = {name: float(value) for name, value in sorted(metrics.items())}
    (folder / METRICS).write_text(json.dumps(flat, indent=2) + "\n", encoding="utf-8")


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write `tables/NAME.csv` with the columns of the first row; an empty table writes nothing."""
    if not rows:
        return None
    path = folder / TABLES / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
