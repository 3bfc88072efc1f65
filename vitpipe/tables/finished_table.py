"""What becomes of a finished table: its files, and its run in MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitpipe.report.seed_results import plain_rows
from vitpipe.report.table_page import TableReport, table_markdown, write_table_files
from vitpipe.tables.table_plan import TablePlan
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.table_run import log_table


def keep_table(
    plan: TablePlan, report: TableReport, folder: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """Write a table's files into a folder and send it to MLflow; name -> file.

    Args:
        say: is told of an MLflow that does not answer, which must not turn the table into a failure.

    Raises:
        ArtifactError, StorageError: as `write_table_files`.
    """
    files = write_table_files(report, folder)
    params: dict[str, Any] = {"table": plan.name, "profile": plan.profile, "seeds": str(plan.num_seeds)}
    if plan.overrides:
        params["overrides"] = " ".join(plan.overrides)
    title = f"table {plan.name} ({plan.profile}, seeds: {plan.num_seeds})"
    try:
        log_table(title, params, plain_rows(report.results), files, table_markdown(report))
    except TrackingError as error:
        say(f"MLflow has not received the table; the same command sends it later. {error}")
    return files
