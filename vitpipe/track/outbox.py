"""The outbox: a folder with everything that one run of a stage has to send to MLflow, and what has been sent.

box.json        origin: stage, pipeline, parameters, tags, tracking URI; written once
journal.jsonl   events of the stage (see journal.py); written by the stage
files/          artifacts: tables, figures, pages, a model; written by the stage
producer.json   the stage's process; the file's modification time is its heartbeat
sent.json       what MLflow has received; written by the uploader
contact.json    whether MLflow answers; written by the uploader

No file holds credentials. Every file that is read back holds a checksum, so that damage is detected.
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
from vitpipe.track.journal import JournalContents, JournalReader
from vitpipe.track.producer import Producer, changed_recently

OUTBOX_FOLDER = "track"  # in a stage's state folder
MODEL_FOLDER = "model"  # in `files/`: what a registered model consists of
# File names and JSON keys are an on-disk format: outboxes of earlier versions must still be sent.
OUTBOX_FILE, JOURNAL, FILES, SENT, SERVER_STATUS, LOCK, PRODUCER = (
    "box.json",
    "journal.jsonl",
    "files",
    "sent.json",
    "contact.json",
    "lock",
    "producer.json",
)


class Origin(BaseModel):
    """Where the records of an outbox come from and where they go.

    Attributes:
        id: random, drawn once. It is a tag of the MLflow run, so that the run is found again when the
            process was killed between creating the run and storing its ID.
        store: tracking URI; stored without credentials, which only the environment holds.
        experiment: name of the MLflow experiment.
        experiment_id: set by Kubeflow's MLflow plugin, else empty; overrides `experiment`.
        given_run_id: the MLflow run to continue (`MLFLOW_RUN_ID`), else empty.
        pipeline: key of the pipeline run that this stage belongs to.
        pipeline_title: name of the pipeline's MLflow run.
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


class SentState(BaseModel):
    """What MLflow has received: run IDs and the number of journal entries of each kind.

    Attributes:
        outbox: the outbox's ID, needed when box.json is damaged.
        num_judged: number of statuses in the journal when it was last checked whether the stage's process
            had died.
    """

    model_config = ConfigDict(extra="forbid")

    # The key was "box" in earlier versions.
    outbox: str = Field(default="", validation_alias=AliasChoices("outbox", "box"))
    run_id: str = ""
    parent_id: str = ""
    num_points: int = 0
    num_datasets: int = 0
    num_files: int = 0
    num_models: int = 0
    num_summaries: int = 0
    num_statuses: int = 0
    num_judged: int = 0

    def covers(self, contents: JournalContents) -> bool:
        """True when MLflow has received everything final in a journal."""
        return bool(self.run_id) and (
            self.num_points >= len(contents.final)
            and self.num_datasets >= len(contents.datasets)
            and self.num_files >= len(contents.files)
            and self.num_models >= len(contents.models)
            and self.num_summaries >= len(contents.summaries)
            and self.num_statuses >= len(contents.statuses)
        )


class ServerStatus(BaseModel):
    """Whether MLflow answered the uploader's last attempt.

    Attributes:
        is_asking: the first attempt is still in progress.
        reason: why it failed; empty after a success.
        fix: what the user can do about the reason.
        note: a warning although the attempt succeeded.
        pid: the uploader that wrote this; an earlier one may still be running.
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
        """Folder of the files that are uploaded as artifacts."""
        return self.folder / FILES

    def open(self, origin: Origin) -> Origin:
        """Create the outbox, or continue an existing one; MLflow then continues the same run.

        Returns:
            The origin in effect: the stored one once the run exists, else `origin` with the stored ID.

        Raises:
            StorageError: the disk refuses the write.
        """
        sent = self.sent()
        try:
            known = self.origin()
            if sent is None or sent.run_id:
                return known
            # Nothing sent yet, so that a corrected tracking URI or parameter takes effect. The ID stays: the
            # run may have been created in MLflow before the process was killed, and is found by it.
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
        """Read the origin. Raises OSError when there is no outbox, DamagedError when box.json is damaged."""
        return read_checked(self.folder / OUTBOX_FILE, Origin)

    def sent(self) -> SentState | None:
        """Read what MLflow has received: nothing when sent.json does not exist, None when it is damaged."""
        try:
            return read_checked(self.folder / SENT, SentState)
        except OSError:
            return SentState()
        except DamagedError:
            return None

    def write_sent(self, sent: SentState) -> None:
        """Store what MLflow has received. Raises StorageError."""
        write_checked(self.folder / SENT, sent)

    @property
    def run_id(self) -> str:
        """ID of the MLflow run; empty while it is unknown."""
        sent = self.sent()
        return sent.run_id if sent is not None else ""

    def server_status(self) -> ServerStatus | None:
        """Result of the last attempt to reach MLflow; None before the first one."""
        try:
            return read_checked(self.folder / SERVER_STATUS, ServerStatus)
        except (OSError, DamagedError):
            return None

    def write_server_status(self, status: ServerStatus | None) -> None:
        """Store the result of an attempt to reach MLflow; None removes it. A refused write is ignored."""
        # The status only serves messages. A full disk is reported by the journal or by `write_sent`.
        with contextlib.suppress(StorageError):
            if status is None:
                (self.folder / SERVER_STATUS).unlink(missing_ok=True)
            elif status != self.server_status():
                write_checked(self.folder / SERVER_STATUS, status)

    def producer(self) -> Producer | None:
        """The process that writes this outbox; None when it is unknown."""
        try:
            return read_checked(self.folder / PRODUCER, Producer)
        except (OSError, DamagedError):
            return None

    def write_producer(self, producer: Producer) -> None:
        """Store which process writes this outbox from now on. Raises StorageError."""
        write_checked(self.folder / PRODUCER, producer)

    def touch_producer(self) -> None:
        """Renew the heartbeat by which other machines see that the stage is alive."""
        with contextlib.suppress(OSError):  # mounted buckets cannot set modification times
            os.utime(self.folder / PRODUCER)

    def may_have_live_producer(self) -> bool:
        """True when the process that writes this outbox is alive, or may be: others must not send it then."""
        contents = JournalReader(self.journal).refresh()
        if contents.statuses and not contents.is_running:
            return False  # the final status is the last record
        producer = self.producer()
        if producer is None:  # of a version without producer.json, or killed before it was written
            return changed_recently(self._last_change())
        return producer.may_be_alive(self._last_change())

    def is_delivered(self) -> bool:
        """True when MLflow has received everything that is final."""
        sent = self.sent()
        return sent is not None and sent.covers(JournalReader(self.journal).refresh())

    def is_settled(self) -> bool:
        """True when everything is delivered, and the run is marked KILLED if it has no final status."""
        sent, contents = self.sent(), JournalReader(self.journal).refresh()
        if sent is None or not sent.covers(contents):
            return False
        return not contents.is_running or sent.num_judged >= len(contents.statuses)

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock that allows one process at a time to send this outbox.

        Yields:
            False when another process holds it and `wait` is false.
        """
        # The kernel releases a flock when its process dies, so that no stale lock file can block an outbox.
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                # A file system without locks: the delivery still compares with what MLflow has.
                pass
            yield True
        finally:
            os.close(descriptor)

    def _last_change(self) -> float:
        """Latest modification time of the folder and its entries (seconds since the epoch)."""
        times = [0.0]
        for path in (self.folder, *self.folder.iterdir()):
            with contextlib.suppress(OSError):  # a temporary file that was renamed meanwhile
                times.append(path.stat().st_mtime)
        return max(times)


def table_as_json(rows: list[dict[str, object]]) -> str:
    """Format a table as `mlflow.log_table` does, so that MLflow's table view and `load_table` read it."""
    columns = list(rows[0]) if rows else []
    data = [[plain_value(row.get(column)) for column in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data})


def plain_value(value: object) -> object:
    """Convert scalars of numpy and torch to Python numbers; other values that JSON lacks become text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # numpy and torch scalars both have `item()`; importing either here would cost every stage its import
    # time.
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
