"""Run what a published table, or the references, still lack, one stage after the other.

Finished stages are found and reused, so the same command goes on wherever an earlier one ended. A stage that
fails stops the rows that need it and no others.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import ArtifactError, RunError, StoppedError
from vitpipe.contracts.processes import sigterm_interrupts
from vitpipe.contracts.units import format_duration
from vitpipe.stages.folder_lock import holder_of, locked_folders
from vitpipe.stages.resolved import training_steps
from vitpipe.tables.stage_process import run_stage_process, stage_arguments
from vitpipe.tables.table_plan import FinishedStages, RunPlan, StageWork, TableRun

_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Failure:
    """Why a run has no result: the stage that failed, and its error."""

    stage: str
    message: str


@dataclass
class Progress:
    """What a call has done so far; kept when it is interrupted.

    Attributes:
        num_stages: stages that were run by this call.
        failures: title of a run -> what failed in it.
    """

    num_stages: int
    failures: dict[str, Failure]


def planned_stages(plan: RunPlan) -> list[dict[str, Any]]:
    """One row per stage of every run: what would happen to it, its optimiser steps, its folder."""
    finished, first = FinishedStages(plan.runs), dict[str, TableRun]()
    rows = []
    for run, stages in plan.started_runs():
        steps = training_steps(run.recipe, 1)
        for work in stages:
            owner, folder = first.setdefault(work.key, run), finished.folder(run, work.name)
            does = "finished" if folder else "runs" if owner is run else "shared"
            rows.append(
                {
                    "run": run.title,
                    "stage": work.name,
                    "does": does,
                    "steps": steps.get(work.name, "") if does == "runs" else "",
                    "folder": str(folder or owner.folder / work.name),
                }
            )
    return rows


def run_table(plan: RunPlan, say: Callable[[str], None], progress: Progress) -> None:
    """Run every wanted stage that is not finished.

    Args:
        say: gets the lines of this function and of the stages.
        progress: is filled, also when this function is left by an exception.

    Raises:
        ArtifactError: another process runs this plan.
        StoppedError: Ctrl-C or SIGTERM; the stage that was running has saved its state.
    """
    if holder := holder_of(plan.folder):
        raise ArtifactError(
            f"Another process makes the {plan.title}: {holder}",
            where=plan.folder,
            fix="wait for it, or stop it",
        )
    finished, failed = FinishedStages(plan.runs), dict[str, Failure]()
    with locked_folders(plan.folder, say=say), sigterm_interrupts():
        try:
            for run, stages in plan.started_runs():
                for work in stages:
                    failure = _finish(plan, run, work, finished, failed, progress, say)
                    # The first one is the cause; what comes after it in this run only lacks its output.
                    if failure is not None:
                        progress.failures.setdefault(run.title, failure)
        except KeyboardInterrupt as stop:
            raise _stopped(plan, stop) from None


def _finish(
    plan: RunPlan,
    run: TableRun,
    work: StageWork,
    finished: FinishedStages,
    failed: dict[str, Failure],
    progress: Progress,
    say: Callable[[str], None],
) -> Failure | None:
    """See to it that a stage is finished; what failed for it, by its key or upstream."""
    if finished.folder(run, work.name) is not None:
        return None
    for feeder in (work.name, *work.node.inputs.values()):
        if known := failed.get(run.stages[feeder].key):
            failed[work.key] = known
            return known
    inputs = finished.inputs(run, work.name)
    out = run.folder / work.name
    _wait_for_others(out, say)
    # Another process may just have finished it.
    if inputs is not None and finished.folder(run, work.name) is None:
        say(f"=== {run.title}: {work.name} -> {out}")
        started = time.monotonic()
        arguments = stage_arguments(work.name, run.name, plan.profile, work.overrides, inputs, out)
        log = plan.folder / "logs" / f"{run.name.replace('/', '_')}-seed{work.recipe.seed}-{work.name}.log"
        progress.num_stages += 1
        try:
            run_stage_process(arguments, log, say)
        except RunError as error:
            failed[work.key] = Failure(work.name, f"{error.what} (log: {error.where})")
            say(f"=== {run.title}: {work.name} failed: {error.what}")
            return failed[work.key]
        say(f"=== {run.title}: {work.name} took {format_duration(time.monotonic() - started)}")
    if finished.folder(run, work.name) is None:
        # Its own process has just written it by what it found: code, recipe or data are no longer those of
        # the plan.
        failed[work.key] = Failure(
            work.name, "code, recipe or data have changed since this command was started; run it again"
        )
        return failed[work.key]
    return None


def _wait_for_others(out: Path, say: Callable[[str], None]) -> None:
    """Wait while another process writes a stage's folder: another table may need the same recipe."""
    said = ""
    while holder := holder_of(out):
        if holder != said:
            said = holder
            say(f"Waiting for {holder}, which writes {out}")
        time.sleep(_POLL_SECONDS)


def _stopped(plan: RunPlan, stop: KeyboardInterrupt) -> StoppedError:
    return StoppedError(
        f"Stopped while making the {plan.title}; finished stages and saved training states are kept",
        where=plan.folder,
        fix="the same command goes on from there",
        by=stop.args[0] if stop.args else signal.SIGINT,
    )
