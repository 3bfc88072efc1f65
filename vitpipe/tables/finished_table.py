"""A finished table as a run of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitpipe.report.seed_results import plain_rows
from vitpipe.report.table_page import TableReport, table_markdown
from vitpipe.tables.table_plan import TablePlan
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.table_run import log_table


def send_table(
    plan: TablePlan, report: TableReport, files: Mapping[str, Path], say: Callable[[str], None]
) -> None:
    """Send a table to MLflow. Called when it is written and shown: a server may take minutes not to answer.

    Args:
        files: as `write_table_files` returns them.
        say: is told of an MLflow that does not answer, which must not turn the table into a failure.
    """
    params: dict[str, Any] = {"table": plan.name, "profile": plan.profile, "seeds": str(plan.num_seeds)}
    if plan.overrides:
        params["overrides"] = " ".join(plan.overrides)
    title = f"table {plan.name} ({plan.profile}, seeds: {plan.num_seeds})"
    try:
        log_table(title, params, plain_rows(report.results), files, table_markdown(report))
    except TrackingError as error:
        say(f"MLflow has not received the table; the same command sends it later. {error}")
