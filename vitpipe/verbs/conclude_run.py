"""The verb `conclude`: the task at the end of a pipeline run, which the package starts in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.options import ExecutorInputOption, FixedProfileOption, FixedRecipeOption, SetOption


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="conclude", hidden=True)(conclude)


def conclude(
    recipe: FixedRecipeOption,
    profile: FixedProfileOption,
    executor_input: ExecutorInputOption,
    states: Annotated[
        Path | None, typer.Option(envvar="VITPIPE_STATES", help="folder of the states of many runs")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Report on a pipeline run some of whose stages have failed, and mark the MLflow runs of dead pods.

    Compiled packages call this.
    """
    from vitpipe.stages.conclude import conclude as conclude_run
    from vitpipe.stages.executor import ExecutorIO

    io = ExecutorIO(executor_input)
    conclude_run(io, io.recipe(recipe, profile, overrides or ()), states and states.resolve())
