"""Run one stage as a TrainJob: make the job or adopt it, follow it; delete it when cancelled.

A launcher may die at any moment: the job goes on, and the next launcher of the task finds it by its name.
Only a signal that asks the launcher to stop (SIGTERM, Ctrl-C) deletes the job, whose ranks save their state.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vitpipe.cluster.job_api import (
    WATCH_SECONDS,
    ExistsError,
    ExpiredError,
    Job,
    JobApi,
    Patience,
    UnreachableError,
)
from vitpipe.cluster.job_state import (
    COMPLETE,
    described,
    digest_in,
    disruptions,
    ended,
    failures,
    is_ours,
    remedy,
)
from vitpipe.cluster.node_log import NodeLog
from vitpipe.cluster.settings import TrainJobSettings
from vitpipe.contracts.errors import InputError, RunError, StoppedError, VitpipeError
from vitpipe.contracts.processes import sigterm_interrupts

# The last lines of a log after its job has ended; requests to delete the job before the pod itself is killed.
_LAST_LINES_SECONDS, _CANCEL_SECONDS = 30.0, 20.0
_PAUSE_SECONDS = 1.0


def run_job(
    api: JobApi,
    job: Job,
    settings: TrainJobSettings,
    *,
    is_usable: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Run a job to its end.

    Args:
        job: as `train_job`.
        is_usable: whether the result of a complete job is there; one without is made again.
        say: receives every line, those of the job's log among them.

    Raises:
        RunError: the job has failed, or took longer than `time_limit_seconds`; it was deleted by somebody.
        InputError: another job has the name, or the API refuses this one.
        EngineError: the API does not answer; the job goes on.
        StoppedError: SIGTERM or Ctrl-C; the job is deleted.
    """
    launch = _Launch(api, job, settings, say)
    with sigterm_interrupts():
        try:
            launch.ensure(is_usable)
            launch.follow()
        except KeyboardInterrupt as stop:
            number = int(stop.args[0]) if stop.args else signal.SIGINT
            launch.cancel()
            raise StoppedError(
                f"Stopped by {signal.Signals(number).name}; the job was deleted, and its ranks were asked to "
                "save their state",
                where=launch.place,
                fix="run the same command again; it resumes from the saved state",
                by=number,
            ) from None


class _Launch:
    """One job, from its creation to its end."""

    def __init__(self, api: JobApi, job: Job, settings: TrainJobSettings, say: Callable[[str], None]) -> None:
        self._api, self._job, self._settings, self._say = api, job, settings, say
        self._name: str = job["metadata"]["name"]
        self.place = f"TrainJob {self._name} in namespace {api.namespace}"
        self._until = (
            time.monotonic() + settings.time_limit_seconds if settings.time_limit_seconds else float("inf")
        )
        self._last_state, self._told = "", set[str]()

    def ensure(self, is_usable: Callable[[], bool]) -> None:
        """Make the job, or adopt it; one that has ended without a usable result is made again."""
        patience = self._patience()
        is_first = True
        while True:
            self._check_time()
            try:
                found, _ = self._api.find(self._name)
                if found is None:
                    self._api.create(self._job)
                    self._say(f"{self.place} was created")
                    return
                patience.succeed()
                if self._fits(found, is_usable):
                    self._say(f"{self.place} is there already and was adopted; it {described(found)}")
                    return
                if not found["metadata"].get("deletionTimestamp"):
                    self._say(f"{self.place} {described(found)}; it is made again")
                    self._api.delete(self._name, found["metadata"]["uid"])
                elif is_first:
                    self._say(f"{self.place} is being deleted; it is made again after that")
                is_first = False
                time.sleep(_PAUSE_SECONDS)
            except ExistsError:
                # An answer to an earlier request was lost, or another launcher was faster.
                time.sleep(_PAUSE_SECONDS)
            except UnreachableError as error:
                patience.wait(error)

    def _fits(self, found: Job, is_usable: Callable[[], bool]) -> bool:
        """Whether a job that is there is adopted; False: it has to go, or is going.

        Raises:
            InputError: it is somebody else's, or at work on something else.
        """
        if not is_ours(found):
            raise InputError(
                "There is a job of this name that vitpipe has not made",
                where=self.place,
                fix="rename or delete it (`kubectl delete trainjob`)",
            )
        is_same = digest_in(found) == digest_in(self._job)
        if found["metadata"].get("deletionTimestamp"):
            return False
        if end := ended(found):
            return is_same and end == COMPLETE and is_usable()
        if not is_same:
            raise InputError(
                "A job of this run and stage is at work with another specification (image, size or place); "
                "it was left alone",
                where=self.place,
                fix=f"delete it (`kubectl delete trainjob {self._name} -n {self._api.namespace}`), or give "
                "the settings that it was made with",
            )
        return True

    def follow(self) -> None:
        """Print state and log until the job ends."""
        log = NodeLog(self._api, self._name, self._say)
        log.start()
        job = self._last_job()
        log.finish(_LAST_LINES_SECONDS)
        if ended(job) == COMPLETE:
            return
        pods = self._pods()
        details = [*disruptions(pods), *failures(pods)]
        more = f"; {'; '.join(details[:3])}" if details else ""
        raise RunError(f"The job {described(job)}{more}", where=self.place, fix=remedy(job, pods))

    def cancel(self) -> None:
        """Delete the job if it is the one that this launcher follows."""
        until = time.monotonic() + _CANCEL_SECONDS
        self._say(f"Deleting {self.place}")
        while time.monotonic() < until:
            try:
                found, _ = self._api.find(self._name)
                if found is not None and is_ours(found) and digest_in(found) == digest_in(self._job):
                    self._api.delete(self._name, found["metadata"]["uid"])
                return
            except UnreachableError:
                time.sleep(_PAUSE_SECONDS)
        self._say(f"Kubernetes does not answer; {self.place} may be at work still. Delete it by hand")

    def _last_job(self) -> Job:
        """Watch the job until it has ended; read it anew whenever the watch breaks."""
        patience = self._patience()
        while True:
            self._check_time()
            try:
                job, place = self._api.find(self._name)
                patience.succeed()
                if self._tell(job):
                    return job  # type: ignore[return-value]
                seconds = min(WATCH_SECONDS, self._until - time.monotonic())
                for kind, job in self._api.changes(self._name, place, max(seconds, 1)):
                    patience.succeed()
                    if self._tell(None if kind == "DELETED" else job):
                        return job
            except ExpiredError:
                pass
            except UnreachableError as error:
                patience.wait(error)
                continue
            # A server that ends every watch at once is not asked without a pause.
            time.sleep(_PAUSE_SECONDS)

    def _tell(self, job: Job | None) -> bool:
        """Say what has changed; True when the job has ended.

        Raises:
            RunError: it was deleted.
        """
        if job is None:
            raise RunError(
                "The job was deleted by somebody else",
                where=self.place,
                fix="run the same command again: it makes the job again and resumes from the saved state",
            )
        state = described(job)
        if state != self._last_state:
            self._say(f"{self.place} {state}")
            self._last_state = state
        for line in disruptions(self._pods()):
            if line not in self._told:
                self._told.add(line)
                self._say(f"{self.place}: {line}")
        return bool(ended(job))

    def _pods(self) -> list[Any]:
        # Details only: the job's own state decides.
        with suppress(VitpipeError):
            return self._api.pods(self._name)
        return []

    def _check_time(self) -> None:
        """Raise RunError, with the job deleted, when the launcher's time is over."""
        if time.monotonic() < self._until:
            return
        self.cancel()
        raise RunError(
            f"The job took longer than time_limit_seconds ({self._settings.time_limit_seconds}), waiting "
            "included, and was deleted",
            where=self.place,
            fix="raise the limit, or see why it waits (`kubectl describe trainjob`); the next run resumes "
            "from the saved state",
        )

    def _patience(self) -> Patience:
        return Patience(self._settings.unreachable_seconds, self._say)
