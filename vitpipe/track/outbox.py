"""The outbox: a folder that holds all that one run of a stage has to tell MLflow, and what was told.

box.json        who speaks: stage, pipeline, parameters, tags, where to; written once
journal.jsonl   what is said (see journal.py); written by the stage
files/          tables, figures, pages to hand over; written by the stage
producer.json   the stage's process; its time of change says when it was seen alive
sent.json       how far it has been told; written by the uploader
contact.json    whether MLflow answers; written by the uploader

No file holds credentials. Whatever is read back carries a checksum: what is damaged is recognised.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import StorageError, disk_errors
from vitpipe.track.checked_json import DamagedError, read_checked, write_checked
from vitpipe.track.journal import JournalReader, Ledger
from vitpipe.track.producer import Producer, changed_lately

OUTBOX_FILE, JOURNAL, FILES, SENT, CONTACT, LOCK, PRODUCER = (
    "box.json",
    "journal.jsonl",
    "files",
    "sent.json",
    "contact.json",
    "lock",
    "producer.json",
)


class Origin(BaseModel):
    """Who speaks and to whom.

    Attributes:
        id: random, drawn once; the MLflow run carries it as a tag, so it can be found again when the
            process died between making the run and writing down its number.
        store: tracking URI; stored without credentials, which the environment has.
        experiment_id: given by Kubeflow's plugin, else empty.
        given_run_id: the MLflow run to continue (`MLFLOW_RUN_ID`), else empty.
        pipeline: key of the pipeline run that this stage belongs to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    store: Address
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
    """How far MLflow has been told: run numbers and the count of journal entries of each kind.

    Attributes:
        outbox: the outbox's id, in case that box.json is damaged.
        num_judged: statuses of the journal when it was last decided whether the run's process had died.
    """

    model_config = ConfigDict(extra="forbid")

    # "box" in files written before the outbox had its name.
    outbox: str = Field(default="", validation_alias=AliasChoices("outbox", "box"))
    run_id: str = ""
    parent_id: str = ""
    num_points: int = 0
    num_datasets: int = 0
    num_files: int = 0
    num_summaries: int = 0
    num_statuses: int = 0
    num_judged: int = 0

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
    """Whether MLflow answered last time, and why not.

    Attributes:
        is_asking: nothing has been heard yet; somebody asks at this moment.
        fix: what the user can do about the reason.
        note: something that went well but that the user should know.
        pid: the uploader that wrote this; an older one may still be at work.
    """

    reached: bool
    is_asking: bool = False
    reason: str = ""
    fix: str = ""
    note: str = ""
    pid: int = Field(default_factory=os.getpid)


class Outbox:
    """One outbox folder."""

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
        """Start an outbox, or continue the one that is here: MLflow then goes on with the same run."""
        sent = self.sent()
        try:
            known = self.origin()
            if sent is None or sent.run_id:
                return known
            origin = origin.model_copy(update={"id": known.id})
        except OSError:
            pass  # a new outbox
        except DamagedError:
            if sent is not None and sent.outbox:
                origin = origin.model_copy(update={"id": sent.outbox})
        with disk_errors(self.folder):
            self.files.mkdir(parents=True, exist_ok=True)
            write_checked(self.folder / OUTBOX_FILE, origin)
        return origin

    def origin(self) -> Origin:
        """Read who speaks. Raises OSError or DamagedError when there is no whole outbox here."""
        return read_checked(self.folder / OUTBOX_FILE, Origin)

    def sent(self) -> Sent | None:
        """How far it has been told; None when that was written down and is damaged."""
        try:
            return read_checked(self.folder / SENT, Sent)
        except OSError:
            return Sent()
        except DamagedError:
            return None

    def write_sent(self, sent: Sent) -> None:
        """Remember how far it has been told. Raises StorageError."""
        write_checked(self.folder / SENT, sent)

    @property
    def run_id(self) -> str:
        """Number of the MLflow run; empty while it is not known."""
        sent = self.sent()
        return sent.run_id if sent is not None else ""

    def contact(self) -> Contact | None:
        """Whether MLflow answers; None while nobody has asked yet."""
        try:
            return read_checked(self.folder / CONTACT, Contact)
        except (OSError, DamagedError):
            return None

    def write_contact(self, contact: Contact | None) -> None:
        """Remember whether MLflow answers; None forgets. A disk that refuses has worse to tell elsewhere."""
        with contextlib.suppress(StorageError):
            if contact is None:
                (self.folder / CONTACT).unlink(missing_ok=True)
            elif contact != self.contact():
                write_checked(self.folder / CONTACT, contact)

    def producer(self) -> Producer | None:
        """The process that fills this outbox; None when nobody has said so."""
        try:
            return read_checked(self.folder / PRODUCER, Producer)
        except (OSError, DamagedError):
            return None

    def write_producer(self, producer: Producer) -> None:
        """Say who fills this outbox from now on. Raises StorageError."""
        write_checked(self.folder / PRODUCER, producer)

    def producer_lives(self) -> None:
        """Leave a sign of life for other machines."""
        with contextlib.suppress(OSError):  # mounted buckets cannot change times
            os.utime(self.folder / PRODUCER)

    def may_be_filled(self) -> bool:
        """Whether the process that fills this outbox is alive, or may be: then others leave it alone."""
        statuses = JournalReader(self.journal).refresh().statuses
        if statuses and statuses[-1][0] != "RUNNING":
            return False  # it has had its last word
        producer = self.producer()
        if producer is None:
            return changed_lately(self._last_change())
        return producer.may_live(self._last_change())

    def is_delivered(self) -> bool:
        """True when MLflow has been told everything that is final."""
        sent = self.sent()
        return sent is not None and sent.covers(JournalReader(self.journal).refresh())

    def is_settled(self) -> bool:
        """True when MLflow has been told everything, and also that the process has died if it has."""
        sent, ledger = self.sent(), JournalReader(self.journal).refresh()
        if sent is None or not sent.covers(ledger):
            return False
        is_open = bool(ledger.statuses) and ledger.statuses[-1][0] == "RUNNING"
        return not is_open or sent.num_judged >= len(ledger.statuses)

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Be the only one who sends this outbox.

        Yields:
            False when another process has it and `wait` is false.
        """
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # a file system without locks: what MLflow has already is looked up all the same
            yield True
        finally:
            os.close(descriptor)

    def _last_change(self) -> float:
        """When something in the folder changed last (seconds since the epoch)."""
        times = [0.0]
        for path in (self.folder, *self.folder.iterdir()):
            with contextlib.suppress(OSError):  # a file that was written aside a moment ago
                times.append(path.stat().st_mtime)
        return max(times)


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
