"""The task at the end of a table's pipeline: our column beside the paper's, whatever became of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import InputError
from vitpipe.report.table_page import MARKDOWN, PAGE, table_lines, write_table_files
from vitpipe.stages.conclude import failure_of, mark_dead
from vitpipe.stages.executor import ExecutorIO
from vitpipe.stages.pipeline_run import COMPARISON, ROWS, SEEDS, STATUS, TABLE_PAGES
from vitpipe.stages.run_records import all_records
from vitpipe.tables.finished_table import send_table
from vitpipe.tables.recorded_stages import RecordedStages
from vitpipe.tables.run_table import Failure
from vitpipe.tables.table_plan import TablePlan, plan_table
from vitpipe.tables.table_results import table_report
from vitpipe.track.delivery import print_to_stderr

_FILES = {"HTML": PAGE, "Markdown": MARKDOWN}  # Kubeflow's type of a page -> file
_LOG_WIDTH = 160  # columns of the table in a log, which has no width of its own


def compare(
    io: ExecutorIO,
    table: str,
    profile: str,
    states: Path | None,
    say: Callable[[str], None] = print_to_stderr,
) -> None:
    """Write the table of a pipeline run from what its stages have left; rows without a result say why.

    Args:
        io: of the task; its parameters say which rows and how many seeds, and Kubeflow's final status.
        table: `PAPER/NUMBER`.
        states: as in `conclude`.
        say: writes a line to the log.

    Raises:
        RecipeError, InputError: as `plan_table`.
        ArtifactError, StorageError: as `write_table_files`.
    """
    plan = _plan(io, table, profile)
    # Also of earlier runs, whose outputs Kubeflow may have taken from its cache.
    records = all_records(states, io.pipeline_run(COMPARISON), of_all_runs=True)
    if failure := failure_of(io.parameters().get(STATUS)):
        say(f"The run has failed: {failure}")
        if states is not None:
            mark_dead(states, {(run.name, run.recipe.profile) for run in plan.runs}, say)
    if not records:
        # Nothing is known of the runs: a table would call all of them failed.
        why = "" if states else " The placement has no `claims.state`, on which stages leave them."
        say(f"There are no results of stages to compare.{why}")
        io.finish_with_text(f"There are no results of stages to compare.{why}")
        return
    finished = RecordedStages(records)
    missing = _unfinished(plan, finished)
    if missing and not failure:
        say(f"Kubeflow took these from its cache, and no record of them is left: {', '.join(missing)}")
    report = table_report(plan, missing if failure else {}, finished)
    files = write_table_files(report, io.output_folder())
    for line in table_lines(report, width=_LOG_WIDTH):
        say(line)
    counts = {f"num_{name.replace(' ', '_')}": float(count) for name, count in report.counts().items()}
    io.finish_with_files({output: files[_FILES[kind]] for output, kind in TABLE_PAGES.items()}, counts)
    send_table(plan, report, files, say)


def _unfinished(plan: TablePlan, finished: RecordedStages) -> dict[str, Failure]:
    """Title of a run -> its first stage that has left nothing: it failed, or never started."""
    found: dict[str, Failure] = {}
    for run, stages in plan.started_runs():
        missing = [work.name for work in stages if finished.folder(run, work.name) is None]
        if missing:
            found[run.title] = Failure(
                missing[0], "it has left no result; Kubeflow's page of the run says why"
            )
    return found


def _plan(io: ExecutorIO, table: str, profile: str) -> TablePlan:
    given = io.parameters()
    paper, _, number = table.partition("/")
    return plan_table(
        paper, number, profile,
        num_seeds=_count(given), overrides=io.overrides(), conditions=io.texts(ROWS),
    )  # fmt: skip


def _count(given: Mapping[str, Any]) -> int:
    # Kubeflow's numbers are doubles: 3 arrives as 3.0.
    value = given.get(SEEDS, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
        raise InputError(
            f"The pipeline parameter '{SEEDS}' is {value!r}, not a number of runs",
            where="--executor-input",
            fix="compile the package again",
        )
    return int(value)
