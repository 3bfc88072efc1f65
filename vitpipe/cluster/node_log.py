"""The log of node 0, where rank 0 runs, printed while the job works, over broken connections and new pods."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from vitpipe.cluster.job_api import JobApi
from vitpipe.contracts.errors import VitpipeError

_INDEX = "batch.kubernetes.io/job-completion-index"
_PAUSE_SECONDS = 2.0
# Clocks of machines differ; what comes twice is recognised by its time.
_OVERLAP_SECONDS = 60


class NodeLog(threading.Thread):
    """Prints the lines of node 0, each once.

    Nothing that goes wrong here ends the launcher: the job matters, and its log can be read elsewhere.

    Args:
        print_line: receives a line without its time.
    """

    def __init__(self, api: JobApi, job: str, print_line: Callable[[str], None]) -> None:
        super().__init__(name="node-log", daemon=True)
        self._api, self._job, self._print = api, job, print_line
        self._is_ending = threading.Event()
        self._read: set[str] = set()  # uids of pods whose log was read to its end
        self._places: dict[str, _Place] = {}

    def run(self) -> None:
        """Follow one pod after another."""
        while True:
            is_last = self._is_ending.is_set()
            # While the API is away there is nothing to read; the launcher itself says so.
            with suppress(VitpipeError):
                for pod in self._api.pods(self._job):
                    if (pod.metadata.labels or {}).get(_INDEX) == "0" and pod.metadata.uid not in self._read:
                        self._follow(pod)
            if is_last:
                return
            self._is_ending.wait(_PAUSE_SECONDS)

    def finish(self, seconds: float) -> None:
        """Wait for the last lines of a job that has ended."""
        self._is_ending.set()
        self.join(seconds)

    def _follow(self, pod: Any) -> None:
        """Print a pod's log until the pod has ended, or, in the last round, what there is of it."""
        if pod.status.phase == "Pending":
            return
        place = self._places.setdefault(pod.metadata.uid, _Place())
        while True:
            is_last = self._is_ending.is_set()
            try:
                for text in self._api.log(pod.metadata.name, place.age_seconds()):
                    if (line := place.new_line(text)) is not None:
                        self._print(line)
                if self._has_ended(pod):
                    self._read.add(pod.metadata.uid)
                    return
            except VitpipeError:
                # A connection that broke or was silent for long, or the pod is gone with its log.
                if self._is_gone(pod):
                    return
            if is_last:
                return
            self._is_ending.wait(_PAUSE_SECONDS)

    def _has_ended(self, pod: Any) -> bool:
        """Whether the pod writes nothing any more; a stream also ends when a server in between says so."""
        same = self._now(pod)
        return same is None or same.status.phase in ("Succeeded", "Failed")

    def _is_gone(self, pod: Any) -> bool:
        try:
            return self._now(pod) is None
        except VitpipeError:
            return False

    def _now(self, pod: Any) -> Any:
        return next((now for now in self._api.pods(self._job) if now.metadata.uid == pod.metadata.uid), None)


class _Place:
    """How far a log was read: the time of the last line, and how many lines have that very time."""

    def __init__(self) -> None:
        self._last, self._num_last, self._num_again = "", 0, 0

    def age_seconds(self) -> int | None:
        """From how long ago to read on, with an overlap; None for the whole log."""
        self._num_again = 0
        if not self._last:
            return None
        last = datetime.fromisoformat(self._last[:19]).replace(tzinfo=UTC)
        return max(1, int((datetime.now(UTC) - last).total_seconds()) + _OVERLAP_SECONDS)

    def new_line(self, text: str) -> str | None:
        """The line without its time; None if it was read before."""
        time, _, line = text.partition(" ")
        moment = _sortable(time)
        if moment is None:
            return text  # not a line of the log: the API itself says something
        if moment < self._last:
            return None
        if moment > self._last:
            self._last, self._num_last, self._num_again = moment, 0, 0
        self._num_again += 1
        if self._num_again <= self._num_last:
            return None
        self._num_last += 1
        return line


def _sortable(time: str) -> str | None:
    """A time as Kubernetes writes it (RFC 3339, UTC, up to nine decimals without trailing zeros), padded."""
    whole, _, decimals = time.removesuffix("Z").partition(".")
    is_time = len(whole) == 19 and whole[10:11] == "T" and (decimals.isdigit() or not decimals)
    return f"{whole}.{decimals:0<9}" if is_time and time.endswith("Z") else None
