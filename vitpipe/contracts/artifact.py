"""A stage's output folder: written aside, renamed when complete, always with its card.

Layout of every folder (design: section 3, "Stage"):

    card.json        who made it, from what, with what, and the checksums of its files
    metrics.json     flat name -> number
    tables/*.csv     one file per table
    weights.safetensors and others, by stage
    run.json         when and where it ran (provenance.py); the same inputs give the same bytes of all others
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitpipe.contracts.errors import ArtifactError, disk_errors
from vitpipe.contracts.files import is_empty, move_aside, read_text, remove, sync_folder, write_whole
from vitpipe.contracts.provenance import CARD as CARD
from vitpipe.contracts.provenance import (
    CARD_CHECKSUM,
    RUN_HISTORY,
    UNTRACKED,
    checksum_of,
    digest_of_card,
    is_measured,
    read_json,
    read_provenance,
    read_run_record,
    write_run_record,
)
from vitpipe.contracts.provenance import Card as Card
from vitpipe.contracts.provenance import RunRecord as RunRecord
from vitpipe.contracts.provenance import read_card as read_card
from vitpipe.contracts.units import counted

METRICS, TABLES, WEIGHTS = "metrics.json", "tables", "weights.safetensors"
MANIFEST = "manifest.json"
HISTORY = "history"  # the table of learning curves, a point a row
CURVES = "curves.csv"  # the same, a step a row, as `dvc plots` and spreadsheets read it
TEMPORARY = ("partial", "replaced")  # endings of the hidden folders beside an output that `writing` uses
# In a folder that is being written, so that nobody else's folder is ever taken for one.
_WRITING = ".being-written-by-vitpipe"


class Artifact:
    """A finished output folder, opened for reading.

    Attributes:
        card: provenance, the same whenever the same inputs gave the same result.
        metrics: all flat numbers, measured speeds among them where they are known.
        run: when and where it ran; empty values where the folder comes from DVC.
        remark: why `run` is empty although there is a file; empty if all is well.
    """

    def __init__(
        self,
        path: Path,
        card: Card,
        metrics: dict[str, float],
        run: RunRecord | None = None,
        remark: str = "",
    ) -> None:
        self.path, self.card, self.run, self.remark = path, card, run or RunRecord(), remark
        self.metrics = {**metrics, **self.run.metrics}

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of all libraries that are known to have been installed."""
        return {**self.card.libraries, **self.run.libraries}

    @property
    def weights(self) -> Path:
        """Path of `weights.safetensors`.

        Raises:
            ArtifactError: when this stage made no weights.
        """
        path = self.path / WEIGHTS
        if path.is_file():
            self.verify(WEIGHTS)
        else:
            raise ArtifactError(
                f"The output of stage '{self.card.stage}' holds no weights",
                where=path,
                fix="give the folder of a stage that trains a model: pretrain, intermediate, finetune",
            )
        return path

    def verify(self, *names: str) -> None:
        """Compare files with the checksums on the card: the named ones, or all of them.

        Raises:
            ArtifactError: naming the first file that is missing or has changed.
        """
        for name in names or tuple(self.card.files):
            expected = self.card.files.get(name)  # None on a card of version 1
            if expected is not None and _sha256(self.path / name) != expected:
                raise ArtifactError(
                    "The file is missing or damaged: its checksum is not the one on the card",
                    where=self.path / name,
                    fix=f"run stage '{self.card.stage}' again, or get its output from DVC (`dvc checkout`)",
                )

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """All tables as name -> rows; every cell is text as in the CSV file."""
        found: dict[str, list[dict[str, str]]] = {}
        for file in sorted((self.path / TABLES).glob("*.csv")):
            self.verify(f"{TABLES}/{file.name}")
            with file.open(newline="", encoding="utf-8") as handle:
                found[file.stem] = list(csv.DictReader(handle))
        measured = self.path / RUN_HISTORY
        if self.run.card and measured.is_file():
            with measured.open(newline="", encoding="utf-8") as handle:
                found.setdefault(HISTORY, []).extend(csv.DictReader(handle))
        return found


def open_artifact(path: Path, stage: str | None = None) -> Artifact:
    """Open a finished output folder.

    Args:
        path: the folder.
        stage: when given, the stage that must have made it.

    Raises:
        ArtifactError: when the folder is missing, incomplete, damaged or of another stage.
    """
    if not path.is_dir() or is_empty(path):
        absent = "The input is a file, not a folder" if path.exists() else "The input folder does not exist"
        unused = f"The stage{f' {stage!r}' if stage else ''} has not run yet: its folder is empty"
        raise ArtifactError(
            unused if path.is_dir() else absent,
            where=path,
            fix=f"run the stage that makes it first{f' (vitpipe run {stage} ...)' if stage else ''}, "
            "or let `dvc repro` run the chain in order",
        )
    try:
        card, run, remark = read_provenance(path)
        metrics = read_json(path / METRICS)
    except PermissionError as error:
        raise ArtifactError(
            f"The folder may not be read ({error.strerror})",
            where=error.filename or path,
            fix="give this user the right to read it; a stage's output is readable by all by default",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"The folder is not a finished stage output ({_reason(error)})",
            where=path,
            fix="move it away and run its stage again, or get it from DVC (`dvc checkout`)",
        ) from error
    if stage is not None and card.stage != stage:
        raise ArtifactError(
            f"The folder was made by stage '{card.stage}', but '{stage}' is needed here",
            where=path,
            fix="check the order of the --in NAME=DIR arguments",
        )
    artifact = Artifact(path, card, metrics, run, remark)
    # Weights and tables are verified when they are opened: hashing 1 GB of weights here would cost every
    # stage that only wants the metrics two seconds.
    artifact.verify(METRICS, *(name for name in card.files if Path(name).name == MANIFEST))
    return artifact


def is_marked(folder: Path) -> bool:
    """Whether a folder is a stage's output, of this or any other version, finished or damaged."""
    try:
        values = json.loads(read_text(folder / CARD))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"schema_version", "stage", "recipe"} <= set(values)


def is_being_written(folder: Path) -> bool:
    """Whether a folder is one that `writing` has begun."""
    return (folder / _WRITING).is_file()


def folder_in_work(out: Path) -> Path:
    """The hidden folder beside `out` that `writing` fills before it is renamed to `out`."""
    # Beside the target of a link, not beside the link: a rename works only within one file system.
    out = out.resolve()
    return out.with_name(f".{out.name}.{TEMPORARY[0]}")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; rename it to `out` on success, delete it on any failure.

    An `out` that exists already is replaced at the moment of the rename, not before; one that is not a
    stage's output is not replaced at all. A symbolic link is followed: the result lies where it points to.

    Raises:
        ArtifactError: `out`, or the folder beside it that is written first, is somebody else's.
        StorageError: when the disk is full or read-only.
    """
    out = out.resolve()
    partial, replaced = folder_in_work(out), out.with_name(f".{out.name}.{TEMPORARY[1]}")
    for folder in (out, partial, replaced):
        refuse_foreign(folder)
    with disk_errors(out):
        if is_marked(replaced) and not out.exists():
            replaced.rename(out)  # killed between the two renames below
        remove(partial)
        partial.mkdir(parents=True)
        try:
            (partial / _WRITING).touch()
            yield partial
            (partial / _WRITING).unlink(missing_ok=True)
            refuse_foreign(out)  # files may have been put there during an hour of work
            remove(replaced)
            if out.exists() and changed_files(out):
                move_aside(out, "changed-since-written")  # an edit of the user's may be in it
            # A folder cannot be replaced by a rename unless it is empty, hence the two steps. A kill between
            # them leaves `replaced`, which the next start renames back.
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
            sync_folder(out.parent)
            remove(replaced)
        finally:
            if partial.exists():
                remove(partial)


def refuse_foreign(folder: Path) -> None:
    """Check that a folder may be replaced: it is absent, empty, or a stage's output.

    Raises:
        ArtifactError: naming what is in it.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise _foreign("is a file", folder)
    names = sorted(path.name for path in folder.iterdir())
    if not names or _WRITING in names:
        return
    if not is_marked(folder):
        if CARD in names or {METRICS, TABLES} <= set(names):
            raise _foreign("looks like a stage's output, but its card.json is missing or damaged", folder)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
        raise _foreign(f"holds files that vitpipe has not written ({shown})", folder)


def refuse_added_files(folder: Path) -> None:
    """Check that nothing has been added to a stage's output since it was written.

    Raises:
        ArtifactError: naming such files.
    """
    added = _added_files(folder)
    if added:
        raise _foreign(f"holds files that its stage has not written ({', '.join(added[:3])})", folder)


def changed_files(folder: Path) -> list[str]:
    """Files of a stage's output that are missing, damaged or edited since it was written."""
    try:
        known = read_card(folder).files
    except (OSError, ValueError):
        return []
    # By content: with `dvc config cache.type symlink` every file is a link into DVC's cache.
    return [name for name, digest in known.items() if _sha256(folder / name) != digest]


def _added_files(folder: Path) -> list[str]:
    """Files that the card does not name. Cards of version 1 and damaged ones list no files: then none."""
    try:
        known = set(read_card(folder).files)
    except (OSError, ValueError):
        return []
    if not known:
        return []
    # The latter three are written by file browsers.
    own = known | {CARD, *UNTRACKED, ".DS_Store", "Thumbs.db", "desktop.ini"}
    folders = {str(parent) for name in known for parent in Path(name).parents}
    added = [name for name in _files_of(folder) if name not in own and Path(name).name not in own]
    return added + [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        # Datasets know their own folders (by their manifests); elsewhere even an empty folder is the user's.
        if path.is_dir()
        and path.relative_to(folder).as_posix() not in folders
        and not any((folder / parent / MANIFEST).is_file() for parent in path.relative_to(folder).parents)
    ]


def _foreign(what: str, folder: Path) -> ArtifactError:
    return ArtifactError(
        f"The output folder {what}; nothing was touched",
        where=folder,
        fix="choose another --out, or move this folder away",
    )


def write_card(folder: Path, card: Card, run: RunRecord | None = None) -> None:
    """Write `card.json`, after all other files: it holds their checksums. Then `run.json`, which names it."""
    names = [name for name in _files_of(folder) if name not in (CARD, *UNTRACKED)]
    card = card.model_copy(update={"files": {name: _sha256(folder / name) for name in names}})
    values = card.model_dump(mode="json")
    text = json.dumps({**values, CARD_CHECKSUM: checksum_of(values)}, indent=2)
    write_whole(folder / CARD, text + "\n")
    measured = read_run_record(folder)[0].metrics  # by `write_metrics`
    record = run or RunRecord()
    write_run_record(
        folder,
        record.model_copy(update={"card": digest_of_card(card), "metrics": {**measured, **record.metrics}}),
    )


def _files_of(folder: Path) -> list[str]:
    """Names of all files below a folder; of a dataset's folder its manifest, which knows the rest."""
    found: list[str] = []
    for root, folders, names in os.walk(folder):
        place = Path(root)
        if place != folder and MANIFEST in names:
            # ImageNet-22K has about 5,000 shards; their checksums stand in the manifest already.
            folders.clear()
            names = [MANIFEST]
        found += [(place / name).relative_to(folder).as_posix() for name in names if name != _WRITING]
    return sorted(found)


def _sha256(path: Path) -> str:
    """Hex SHA-256 of a file, empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"{CARD} is damaged: {counted(error.error_count(), 'key is', 'keys are')} missing or wrong"
    if isinstance(error, FileNotFoundError):
        return f"it has no {Path(error.filename).name}"
    return str(error).splitlines()[0]


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write `metrics.json`: flat, sorted, numbers only. Measured speeds go to the run record."""
    flat = {name: float(value) for name, value in sorted(metrics.items())}
    steady = {name: value for name, value in flat.items() if not is_measured(name)}
    (folder / METRICS).write_text(json.dumps(steady, indent=2) + "\n", encoding="utf-8")
    measured = {name: value for name, value in flat.items() if is_measured(name)}
    write_run_record(folder, RunRecord(metrics=measured))


def read_metrics(folder: Path) -> dict[str, float]:
    """All metrics of a folder that is being written; empty before `write_metrics`.

    Raises:
        ValueError: when metrics.json is damaged.
    """
    if not (folder / METRICS).is_file():
        return {}
    return {**read_json(folder / METRICS), **read_run_record(folder)[0].metrics}


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `tables/NAME.csv` with the columns of the first row; an empty table writes nothing.

    The history is also written by step. Its rows that measure time or memory go to a file that DVC does not
    hash.
    """
    if name == HISTORY:
        _write_csv(folder / RUN_HISTORY, [row for row in rows if is_measured(str(row["name"]))])
        rows = [row for row in rows if not is_measured(str(row["name"]))]
        _write_csv(folder / CURVES, _by_step(rows))
    _write_csv(folder / TABLES / f"{name}.csv", rows)


def _by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, one column per name; empty where a step has no such value."""
    columns = dict.fromkeys(sorted({str(row["name"]) for row in rows}), "")
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {"step": row["step"], **columns})[str(row["name"])] = row["value"]
    return [steps[step] for step in sorted(steps)]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unix line ends on every machine: the bytes of a table are part of what DVC compares.
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
