"""The journal: an append-only file with all events of a stage; it survives `kill -9`.

A point is the value of a metric at a step. It is pending until a commit makes it final; only final points
are sent. A resume rewinds: pending points after the resumed step are discarded. A final point never
changes, so steps that are computed again after a crash are not recorded twice.

One JSON object per line, written by one process and read by another (the uploader):

    {"time": ms, "step": n, "values": {name: number}}     points
    {"commit": n}  {"commit": null}                       points up to step n, or all, are final
    {"rewind": n}                                         discard pending points after step n
    {"dataset": {"name": ..., "digest": ..., ...}}        a dataset that the stage reads
    {"file": "tables/x.json", "to": "run" | "pipeline"}   an artifact below files/
    {"model": {"name": ..., "kind": ..., "facts": ...}}   a model for the registry, its files in files/model/
    {"summary": {"metrics": ..., "tags": ...}, "time": ms} goes to the pipeline's run
    {"status": "RUNNING" | "FINISHED" | ..., "time": ms}

Every record also has its `time` and, as last key, a checksum `sum`; older journals lack them in places.
Addresses are written without credentials.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import disk_errors
from vitpipe.track.checked_json import SUM, DamagedError, checksum, parse_checked

# MLflow's own asynchronous logging queue is no substitute: it is in memory and loses its points on a kill.

# A stage that has refused its input before it had numbers: its run is deleted in MLflow.
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "REFUSED"]
Target = Literal["run", "pipeline"]


@dataclass(frozen=True)
class Point:
    """A metric value at an optimiser step; `time_ms` is the recording time (milliseconds since the epoch)."""

    name: str
    step: int
    value: float
    time_ms: int


@dataclass(frozen=True)
class UsedDataset:
    """A dataset that the stage reads; the arguments of `RunLogger.dataset`."""

    name: str
    digest: str
    source: str
    context: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class ArtifactFile:
    """A file below `files/` for the stage's own run or for the pipeline's run."""

    path: str
    target: Target


@dataclass(frozen=True)
class OfferedModel:
    """A model for the registry, whose files lie in `files/model/`.

    Attributes:
        name: of the registered model.
        kind: of the stage's dataset, which says what it predicts.
        headline: metric by which versions are compared; a higher value is better.
        value: of this metric.
        dataset: name and digest of the set that it was measured on: only there are versions compared.
        facts: further tags of the version.
    """

    name: str
    kind: str
    headline: str
    value: float
    dataset: str
    facts: dict[str, str]


@dataclass(frozen=True)
class PipelineSummary:
    """Metrics and tags for the pipeline's run, recorded by its last stage.

    Attributes:
        cards: MLflow run of a stage -> the card of its registered model, with the verdict.
    """

    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int
    cards: dict[str, str] = field(default_factory=dict)


@dataclass
class JournalContents:
    """The state that results from applying the records of a journal in order.

    Attributes:
        final: committed points, in the order of their commits; one per name and step.
        pending: points that a resume may still discard.
        datasets: without duplicates; a resumed stage records them again.
        models: without duplicates, of stages that have finished: one whose stage was killed before its output
            was complete is not in the registry.
        statuses: (status, time in milliseconds since the epoch); the times increase strictly.
        num_damaged: lines that could not be read.
        last_ms: time of the latest record, milliseconds since the epoch; the stage was alive then.
    """

    final: list[Point] = field(default_factory=list)
    pending: dict[tuple[str, int], Point] = field(default_factory=dict)
    datasets: list[UsedDataset] = field(default_factory=list)
    files: list[ArtifactFile] = field(default_factory=list)
    models: list[OfferedModel] = field(default_factory=list)
    summaries: list[PipelineSummary] = field(default_factory=list)
    statuses: list[tuple[Status, int]] = field(default_factory=list)
    num_damaged: int = 0
    last_ms: int = 0
    _final_keys: set[tuple[str, int]] = field(default_factory=set)
    _offered: list[OfferedModel] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The largest step of any point; 0 without points."""
        return max((point.step for point in (*self.final, *self.pending.values())), default=0)

    @property
    def num_tries(self) -> int:
        """How many processes have worked on the stage: each begins with RUNNING."""
        return sum(status == "RUNNING" for status, _ in self.statuses)

    @property
    def is_running(self) -> bool:
        """True when the last status is RUNNING: the stage runs, or was killed without a final status."""
        return bool(self.statuses) and self.statuses[-1][0] == "RUNNING"

    def apply(self, record: Mapping[str, Any]) -> None:
        """Apply one record; a record of an unknown kind is ignored.

        Raises:
            DamagedError: the record has missing or invalid fields; nothing of it was applied.
        """
        try:
            time_ms = int(record.get("time", 0))
            self._apply(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(str(error)) from error
        self.last_ms = max(self.last_ms, time_ms)

    def _apply(self, record: Mapping[str, Any]) -> None:
        if "values" in record:
            step, time_ms = int(record["step"]), int(record["time"])
            # Convert all values before the state changes: a damaged record must not be applied in part.
            points = [Point(name, step, float(v), time_ms) for name, v in record["values"].items()]
            self.pending |= {(p.name, step): p for p in points if (p.name, step) not in self._final_keys}
        elif "commit" in record:
            last = None if record["commit"] is None else int(record["commit"])
            ready = [point for key, point in self.pending.items() if last is None or key[1] <= last]
            for point in ready:
                del self.pending[point.name, point.step]
                self._final_keys.add((point.name, point.step))
            self.final += ready
        elif "rewind" in record:
            step = int(record["rewind"])
            self.pending = {key: p for key, p in self.pending.items() if p.step <= step}
        elif "dataset" in record:
            used = UsedDataset(**record["dataset"])
            if used not in self.datasets:
                self.datasets.append(used)
        elif "file" in record:
            self.files.append(ArtifactFile(record["file"], record["to"]))
        elif "model" in record:
            self._offered = [OfferedModel(**record["model"])]  # a stage has one
        elif "summary" in record:
            self.summaries.append(PipelineSummary(time_ms=record["time"], **record["summary"]))
        elif "status" in record:
            if record["status"] not in get_args(Status):
                raise ValueError(record["status"])
            # The delivery compares statuses by time, and a run may continue on a host whose clock is behind,
            # or a clock may be set back. So each time is at least 1 ms after the one before.
            after = self.statuses[-1][1] + 1 if self.statuses else 0
            self.statuses.append((record["status"], max(int(record["time"]), after)))
            if record["status"] == "FINISHED":
                self.models += [model for model in self._offered if model not in self.models]
            self._offered.clear()  # a resumed stage offers its model again


class JournalReader:
    """Follows a journal that another process may still be writing.

    Attributes:
        contents: as of the last `refresh`.
        offset: end of the complete lines that have been read, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.contents, self.offset = path, JournalContents(), 0

    def refresh(self) -> JournalContents:
        """Read the complete lines that were added since the last call.

        A damaged line (for example half of one, after a power cut) is counted and skipped.
        """
        if not self.path.is_file():
            return self.contents
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            text = handle.read()
        # A last line without a newline is still being written, or was cut short by a kill. In the second case
        # the next `Journal` truncates it, so it must not be consumed here.
        complete = text[: text.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines():
            try:
                self.contents.apply(parse_checked(line))
            except DamagedError:
                self.contents.num_damaged += 1
        return self.contents


class Journal:
    """The writing side. Opening an existing journal continues it.

    Raises:
        StorageError: from every method, when the disk refuses the write.
    """

    def __init__(self, path: Path) -> None:
        reader = JournalReader(path)
        self.path, self.contents = path, reader.refresh()
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            # A kill may have cut the last line short; the next record would be appended to that half line.
            os.ftruncate(self._file, reader.offset)

    def points(self, values: Mapping[str, float], step: int) -> None:
        """Record pending points; a pending point of the same name and step is replaced."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"step": int(step), "values": numbers})

    def commit(self, step: int | None = None) -> None:
        """Make points up to `step` final, or all of them; on disk before this returns."""
        self._append({"commit": None if step is None else int(step)})
        # Only here: pending points that a power cut takes are computed again by the resumed run, but points
        # before a commit belong to a saved training state and would be missing for ever.
        with disk_errors(self.path):
            os.fsync(self._file)

    def rewind(self, step: int) -> None:
        """Discard pending points after `step`."""
        self._append({"rewind": int(step)})

    def dataset(self, used: UsedDataset) -> None:
        """Record a dataset that the stage reads."""
        self._append({"dataset": without_credentials(asdict(used))})

    def file(self, path: str, target: Target = "run") -> None:
        """Record a file below `files/` that is to be uploaded as an artifact."""
        self._append({"file": path, "to": target})

    def model(self, offered: OfferedModel) -> None:
        """Record a model whose files lie in `files/model/`."""
        self._append({"model": without_credentials(asdict(offered))})

    def summary(
        self, metrics: Mapping[str, float], tags: Mapping[str, str], cards: Mapping[str, str]
    ) -> None:
        """Record metrics and tags for the pipeline's run, and cards of models, see `PipelineSummary`."""
        texts = {"tags": without_credentials(tags), "cards": without_credentials(cards)}
        self._append({"summary": {"metrics": {name: float(v) for name, v in metrics.items()}, **texts}})

    def status(self, status: Status) -> None:
        """Record that the stage runs, or its final status."""
        self._append({"status": status})

    def close(self) -> None:
        """Close the file; the journal can be opened again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, values: Mapping[str, Any]) -> None:
        record = {"time": _now_ms(), **values}
        line = json.dumps({**record, SUM: checksum(record)}).encode() + b"\n"
        with disk_errors(self.path):
            size = os.fstat(self._file).st_size
            try:
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError:
                os.ftruncate(
                    self._file, size
                )  # a nearly full disk accepts part of a line and refuses the rest
                raise
        # After the write: what the disk refused must not count as recorded.
        self.contents.apply(record)


def without_credentials(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `values`, nested mappings too, with the credentials of every address replaced by `***`."""
    return {
        key: hidden(value)
        if isinstance(value, str)
        else without_credentials(value)
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }


def _now_ms() -> int:
    return int(time.time() * 1000)
