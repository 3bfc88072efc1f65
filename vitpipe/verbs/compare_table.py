"""The verb `compare-table`: the task at the end of a table's pipeline, which starts in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.options import ExecutorInputOption, FixedProfileOption


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="compare-table", hidden=True)(compare_table)


def compare_table(
    table: Annotated[str, typer.Option("--table", help="PAPER/NUMBER")],
    profile: FixedProfileOption,
    executor_input: ExecutorInputOption,
    states: Annotated[
        Path | None, typer.Option(envvar="VITPIPE_STATES", help="folder of the states of many runs")
    ] = None,
) -> None:
    """Put the results of a table's pipeline run beside the published ones.

    Compiled packages call this.
    """
    from vitpipe.stages.executor import ExecutorIO
    from vitpipe.tables.compare_runs import compare

    compare(ExecutorIO(executor_input), table, profile, states and states.resolve())
