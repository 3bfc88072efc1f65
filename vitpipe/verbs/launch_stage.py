"""The verb `launch`: one stage of a pipeline on several nodes, as a Kubeflow TrainJob."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.completion import complete_stage
from vitpipe.verbs.options import ExecutorInputOption, FixedProfileOption, FixedRecipeOption, SetOption


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="launch")(launch)


def launch(
    stage: Annotated[str, typer.Argument(help="pretrain, finetune, ...", autocompletion=complete_stage)],
    recipe: FixedRecipeOption,
    profile: FixedProfileOption,
    executor_input: ExecutorInputOption,
    job: Annotated[str, typer.Option(help="size and place of the job, JSON: see docs/several-nodes.md")],
    shared: Annotated[Path, typer.Option(help="folder on a claim that this pod and the job's both see")],
    states: Annotated[
        Path | None,
        typer.Option(
            envvar="VITPIPE_STATES",
            help="folder of the states of many runs, on the claim  [default: SHARED/states]",
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Run one stage on several nodes: make a Kubeflow TrainJob, follow it, take its result.

    The components of pipelines call this. Run again, it adopts the job that it finds; SIGTERM deletes it.
    """
    from vitpipe.cluster.settings import read_settings
    from vitpipe.cluster.stage_job import launch_stage
    from vitpipe.stages.executor import ExecutorIO

    settings, io = read_settings(job), ExecutorIO(executor_input)
    named = ["--recipe", recipe, "--profile", profile]
    named += [word for override in overrides or () for word in ("--set", override)]
    loaded = io.recipe(recipe, profile, overrides or ())
    launch_stage(
        stage, loaded, io, settings, shared.resolve(), named=named, states=states and states.resolve()
    )
