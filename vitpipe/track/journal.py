"""The journal: an append-only file of everything a stage reports; it survives `kill -9`.

A point is a name at a step. It is pending until a commit makes it final; only final points are ever
sent. A resume rewinds: pending points after the resumed step are forgotten. A point that is final
stays as it is, so steps that are computed again after a crash are not recorded twice.

One JSON object per line, written by one process and read by another (the uploader):

    {"time": ms, "step": n, "values": {name: number}}     points
    {"commit": n}  {"commit": null}                       final up to step n, or all of them
    {"rewind": n}                                         forget pending points after step n
    {"dataset": {"name": ..., "digest": ..., ...}}        a dataset that the stage reads
    {"file": "tables/x.json", "to": "run" | "pipeline"}   a file to hand over, below files/
    {"summary": {"metrics": ..., "tags": ...}, "time": ms} goes to the pipeline's run
    {"status": "RUNNING" | "FINISHED" | ..., "time": ms}

Every record also has its `time` and, at its end, a checksum `sum`; older journals lack them in places.
Addresses are written without their credentials.
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

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Target = Literal["run", "pipeline"]


@dataclass(frozen=True)
class Point:
    """A number at an optimiser step; `time_ms` is when it was recorded (milliseconds since the epoch)."""

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
class HandedFile:
    """A file below `files/` for the stage's own run or for the pipeline's run."""

    path: str
    target: Target


@dataclass(frozen=True)
class Summary:
    """What the last stage of a pipeline says about all of them."""

    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int


@dataclass
class Ledger:
    """What the records of a journal amount to; a pure fold over them.

    Attributes:
        final: points that will not change any more, in the order of their commits; one per name and step.
        pending: points that a resume may still take back.
        datasets: each once; a resumed stage names them again.
        num_damaged: lines that could not be read.
        last_ms: time of the youngest record: the last sign of life.
    """

    final: list[Point] = field(default_factory=list)
    pending: dict[tuple[str, int], Point] = field(default_factory=dict)
    datasets: list[UsedDataset] = field(default_factory=list)
    files: list[HandedFile] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    statuses: list[tuple[Status, int]] = field(default_factory=list)
    num_damaged: int = 0
    last_ms: int = 0
    _final_keys: set[tuple[str, int]] = field(default_factory=set)

    @property
    def last_step(self) -> int:
        """The largest step of any point; 0 without points."""
        return max((point.step for point in (*self.final, *self.pending.values())), default=0)

    def apply(self, record: Mapping[str, Any]) -> None:
        """Take one record into account; a record of an unknown kind is ignored.

        Raises:
            DamagedError: the record is not what we write; nothing of it was taken.
        """
        try:
            time_ms = int(record.get("time", 0))
            self._take(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(str(error)) from error
        self.last_ms = max(self.last_ms, time_ms)

    def _take(self, record: Mapping[str, Any]) -> None:
        if "values" in record:
            step, time_ms = int(record["step"]), int(record["time"])
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
            self.files.append(HandedFile(record["file"], record["to"]))
        elif "summary" in record:
            self.summaries.append(Summary(time_ms=record["time"], **record["summary"]))
        elif "status" in record:
            if record["status"] not in get_args(Status):
                raise ValueError(record["status"])
            # Each is younger than the one before, also when a clock was put back or another host goes on.
            after = self.statuses[-1][1] + 1 if self.statuses else 0
            self.statuses.append((record["status"], max(int(record["time"]), after)))


class JournalReader:
    """Follow a journal that another process may still be writing. `ledger` is as of the last `refresh`."""

    def __init__(self, path: Path) -> None:
        self.path, self.ledger, self._offset = path, Ledger(), 0

    def refresh(self) -> Ledger:
        """Read the complete lines that have come since; a line torn by a kill is left alone.

        A damaged line (half of one, after a power cut) is counted and passed over: nothing more can be
        known about it.
        """
        if not self.path.is_file():
            return self.ledger
        with self.path.open("rb") as handle:
            handle.seek(self._offset)
            text = handle.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                self.ledger.apply(parse_checked(line))
            except DamagedError:
                self.ledger.num_damaged += 1
        return self.ledger


class Journal:
    """The writing side; opening an existing journal continues it.

    Raises:
        StorageError: from every method, when the disk refuses the write.
    """

    def __init__(self, path: Path) -> None:
        reader = JournalReader(path)
        self.path, self.ledger = path, reader.refresh()
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, reader._offset)  # else the next line would be glued to a torn one

    def points(self, values: Mapping[str, float], step: int) -> None:
        """Record pending points; a pending point of the same name and step is replaced."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"step": int(step), "values": numbers})

    def commit(self, step: int | None = None) -> None:
        """Make points up to `step` final, or all of them; on disk before this returns."""
        self._append({"commit": None if step is None else int(step)})
        with disk_errors(self.path):
            os.fsync(self._file)

    def rewind(self, step: int) -> None:
        """Forget pending points after `step`."""
        self._append({"rewind": int(step)})

    def dataset(self, used: UsedDataset) -> None:
        """Name a dataset that the stage reads."""
        self._append({"dataset": without_credentials(asdict(used))})

    def file(self, path: str, target: Target = "run") -> None:
        """Hand over a file that lies below `files/`."""
        self._append({"file": path, "to": target})

    def summary(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Say something about the whole pipeline run."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append({"summary": {"metrics": numbers, "tags": without_credentials(tags)}})

    def status(self, status: Status) -> None:
        """Record that the stage runs or how it ended."""
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
                os.ftruncate(self._file, size)  # a full disk takes a part of a line and refuses the rest
                raise
        self.ledger.apply(record)


def without_credentials(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, nested ones too, with the credentials of every address in their texts hidden."""
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
