"""Runs the tasks of a package one after the other, by the conditions of start that the package has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.local_containers import RUN_LABEL, TASK_LABEL, Containers
from pipelines.local_graph import Call, call_of, imported, outputs_of
from pipelines.local_reuse import Work, finished_elsewhere, take_output, take_state, work_key
from pipelines.package_tasks import PackageTask, Source
from vitpipe.contracts.errors import ArtifactError, InputError
from vitpipe.contracts.units import format_duration


@dataclass(frozen=True)
class Outcome:
    """What became of a task: `reason` says why it failed or was not started."""

    state: Literal["done", "failed", "skipped"]
    reason: str = ""


class TaskRunner:
    """The tasks of one run.

    Args:
        tasks: in running order.
        parameters: values of the pipeline's parameters.
        folder: the run's folder.
        images: image reference -> ID of its content.
        settings: arguments of every `docker create`.
        development: the containers have the code and libraries of this process.
        reuses: take over finished work of other runs.

    Attributes:
        finished: names of the tasks that are done.
        current: the task that is being run; empty between tasks.
    """

    def __init__(
        self,
        tasks: Sequence[PackageTask],
        parameters: Mapping[str, Any],
        folder: Path,
        containers: Containers,
        images: Mapping[str, str],
        settings: dict[str, Any],
        development: bool,
        reuses: bool,
        say: Callable[[str], None],
    ) -> None:
        self._tasks, self._parameters, self.folder = tasks, parameters, folder
        self._containers, self._images, self.settings = containers, images, settings
        self._development, self._reuses, self._say = development, reuses, say
        self._outputs: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[str, Outcome] = {}
        self.current = ""

    @property
    def finished(self) -> list[str]:
        """Names of the tasks that are done."""
        return [name for name, outcome in self._outcomes.items() if outcome.state == "done"]

    def run_all(self) -> dict[str, Outcome]:
        """Run every task whose conditions hold; task -> what became of it.

        A failed task keeps those that need it from starting, and no others.

        Raises:
            EngineStoppedError: the engine does not answer any more.
            InputError: with `development`, when the code has changed since the package was compiled.
            KeyboardInterrupt: this process was interrupted.
        """
        for number, task in enumerate(self._tasks, start=1):
            outcome = self._skipped(task)
            if outcome is None:
                self.current = task.name
                outcome = self._run(task, f"{task.name} ({number} of {len(self._tasks)})")
                self.current = ""
            else:
                self._say(f"=== {task.name}: not started, {outcome.reason}")
            self._outcomes[task.name] = outcome
        return self._outcomes

    def _skipped(self, task: PackageTask) -> Outcome | None:
        """Why a task is not started; None when it is."""
        lost = sorted(name for name in task.after if self._outcomes[name].state != "done")
        if lost and not task.always:
            return Outcome("skipped", f"because of {', '.join(lost)}")
        for name, source in task.artifacts.items():
            if self._artifact(source) is None and not task.is_optional(name):
                return Outcome("skipped", f"its input '{name}' is missing")
        return None

    def _run(self, task: PackageTask, title: str) -> Outcome:
        if task.is_importer:
            self._outputs[task.name] = imported(task, self._parameter)
            return Outcome("done")
        call = call_of(task, self._arguments(task), self.folder)
        work = Work(self.folder, task.name, task.stage, self._key(task, call))
        if not (self._is_finished(work) or (self._reuses and self._is_taken(work))):
            failure = self._run_container(task, title, call, work)
            if failure is not None:
                self._say(f"=== {task.name} {failure.reason}")
                return failure
        try:
            self._outputs[task.name] = outputs_of(task, call)
        except ValueError as error:
            return Outcome("failed", f"left no usable result ({error})")
        return Outcome("done")

    def _key(self, task: PackageTask, call: Call) -> str:
        try:
            return work_key(task, call.message, self._images[task.image], development=self._development)
        except ArtifactError as error:
            raise InputError(
                "The code has changed since this package was compiled",
                where=error.where,
                fix="start a new run by `vitpipe local --dev`, which compiles it again; what the change does "
                "not concern is taken over",
            ) from error

    def _is_finished(self, work: Work) -> bool:
        if not work.is_finished():
            return False
        self._say(f"=== {work.task}: finished in this run already")
        return True

    def _is_taken(self, work: Work) -> bool:
        found = finished_elsewhere(work)
        if found is None or not take_output(found, work):
            return False
        work.keep_key()
        self._say(
            f"=== {work.task}: taken from {found.out}, which has the same recipe values, code, image, data "
            "and inputs (--no-reuse runs it again)"
        )
        return True

    def _run_container(self, task: PackageTask, title: str, call: Call, work: Work) -> Outcome | None:
        """Run the task's container; why it failed, or None."""
        self._say(f"=== {title}: {self._containers.log(task.name)}")
        work.note()
        if self._reuses and (origin := take_state(work)) is not None:
            self._say(f"{task.name}: goes on from the training state of {origin}")
        settings = self.settings
        # What the run gives wins, as in kfp: a package may name the servers of its cluster.
        environment = {**call.environment, **settings["environment"]}
        labels = {RUN_LABEL: str(self.folder), TASK_LABEL: task.name}
        started = time.monotonic()
        ended = self._containers.run(
            task.name, task.image, call.command, **{**settings, "environment": environment, "labels": labels}
        )
        # The exit code alone proves nothing: a stage that has finished has left its receipt.
        if task.stage and (problem := work.problem()):
            return Outcome("failed", f"{problem}{ended}")
        if ended.code != 0:
            return Outcome("failed", f"did not finish{ended}")
        self._say(f"=== {task.name} took {format_duration(time.monotonic() - started)}")
        return None

    def _arguments(self, task: PackageTask) -> dict[str, Any]:
        """Input name -> value or artifact; what has none is left out."""
        parameters = {name: self._parameter(source) for name, source in task.parameters.items()}
        artifacts = {name: self._artifact(source) for name, source in task.artifacts.items()}
        return {name: value for name, value in {**parameters, **artifacts}.items() if value is not None}

    def _parameter(self, source: Source) -> Any:
        if source.kind == "constant":
            return source.value
        if source.kind == "parameter":
            return self._parameters.get(source.value)
        if source.kind == "output":
            return self._outputs.get(source.task, {}).get(source.value)
        return self._final_status(source.task)

    def _artifact(self, source: Source) -> Any:
        return self._outputs.get(source.task, {}).get(source.value) if source.kind == "output" else None

    def _final_status(self, group: str) -> dict[str, Any]:
        """Kubeflow's PipelineTaskFinalStatus of all that has run so far."""
        failed = {name: out for name, out in self._outcomes.items() if out.state == "failed"}
        status: dict[str, Any] = {
            "state": "FAILED" if failed else "SUCCEEDED",
            "pipelineJobResourceName": self.folder.name,
            "pipelineTaskName": group,
        }
        if failed:
            status["error"] = {"code": 1, "message": "; ".join(f"{k}: {v.reason}" for k, v in failed.items())}
        return status
