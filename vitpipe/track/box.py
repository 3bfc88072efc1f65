"""The box: a folder that holds all that one run of a stage has to tell MLflow, and what was told.

box.json        who speaks: stage, pipeline, parameters, tags, where to; written once
journal.jsonl   what is said (see journal.py); written by the stage
files/          tables, figures, pages to hand over; written by the stage
sent.json       how far it has been told; written by the courier
contact.json    whether MLflow answers; written by the courier
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpipe.errors import disk_errors
from vitpipe.track.journal import JournalReader, Ledger

BOX, JOURNAL, FILES, SENT, CONTACT, LOCK = (
    "box.json",
    "journal.jsonl",
    "files",
    "sent.json",
    "contact.json",
    "lock",
)


class Origin(BaseModel):
    """Who speaks and to whom.

    Attributes:
        id: random, drawn once; the MLflow run carries it as a tag, so it can be found again when the
            process died between making the run and writing down its number.
        store: tracking URI.
        experiment_id: given by Kubeflow's plugin, else empty.
        given_run_id: the MLflow run to continue (`MLFLOW_RUN_ID`), else empty.
        pipeline: key of the pipeline run that this stage belongs to.
    """

    model_config = ConfigDict(frozen=True)

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    store: str
    experiment: str
    experiment_id: str = ""
    given_run_id: str = ""
    pipeline: str
    pipeline_title: str
    stage: str
    params: dict[str, str]
    pipeline_params: dict[str, str]
    tags: dict[str, str]


class Sent(BaseModel):
    """How far MLflow has been told: run numbers and the count of journal entries of each kind."""

    run_id: str = ""
    parent_id: str = ""
    num_points: int = 0
    num_datasets: int = 0
    num_files: int = 0
    num_summaries: int = 0
    num_statuses: int = 0

    def covers(self, ledger: Ledger) -> bool:
        """True when nothing final is left to send."""
        return bool(self.run_id) and (
            self.num_points >= len(ledger.final)
            and self.num_datasets >= len(ledger.datasets)
            and self.num_files >= len(ledger.files)
            and self.num_summaries >= len(ledger.summaries)
            and self.num_statuses >= len(ledger.statuses)
        )


class Contact(BaseModel):
    """Whether MLflow answered last time, and why not."""

    reached: bool
    reason: str = ""


class Box:
    """One box folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def journal(self) -> Path:
        """Path of the journal."""
        return self.folder / JOURNAL

    @property
    def files(self) -> Path:
        """Folder of the files to hand over."""
        return self.folder / FILES

    def open(self, origin: Origin) -> Origin:
        """Start a box, or continue the one that is here: MLflow then goes on with the same run."""
        try:
            known = self.origin()
            if self.sent().run_id:
                return known
            origin = origin.model_copy(update={"id": known.id})
        except (OSError, ValidationError):
            pass  # a new box
        with disk_errors(self.folder):
            self.files.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / BOX, origin.model_dump_json(indent=2))
        return origin

    def origin(self) -> Origin:
        """Read who speaks. Raises OSError or ValidationError when there is no whole box here."""
        return Origin.model_validate_json((self.folder / BOX).read_bytes())

    def sent(self) -> Sent:
        """How far it has been told."""
        try:
            return Sent.model_validate_json((self.folder / SENT).read_bytes())
        except (OSError, ValidationError):
            return Sent()

    def write_sent(self, sent: Sent) -> None:
        """Remember how far it has been told."""
        _replace(self.folder / SENT, sent.model_dump_json())

    def contact(self) -> Contact | None:
        """Whether MLflow answers; None while nobody has asked yet."""
        try:
            return Contact.model_validate_json((self.folder / CONTACT).read_bytes())
        except (OSError, ValidationError):
            return None

    def write_contact(self, contact: Contact | None) -> None:
        """Remember whether MLflow answers; None forgets."""
        if contact is None:
            (self.folder / CONTACT).unlink(missing_ok=True)
        else:
            _replace(self.folder / CONTACT, contact.model_dump_json())

    def is_delivered(self) -> bool:
        """True when MLflow has been told everything that is final."""
        return self.sent().covers(JournalReader(self.journal).refresh())

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Be the only one who sends this box.

        Yields:
            False when another process has it and `wait` is false.
        """
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees the old or the new content, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    aside.replace(path)


def table_as_json(rows: list[dict[str, object]]) -> str:
    """A table in the format of `mlflow.log_table`, so that MLflow's table view and `load_table` read it."""
    columns = list(rows[0]) if rows else []
    data = [[plain_value(row.get(column)) for column in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data})


def plain_value(value: object) -> object:
    """Numbers of numpy and torch as Python's own; anything else that JSON lacks as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
