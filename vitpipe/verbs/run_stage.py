"""The verb `run`: one stage, as dvc.yaml, the Kubeflow components and people call it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vitpipe.contracts.address import hidden
from vitpipe.verbs.completion import complete_stage
from vitpipe.verbs.options import ParamsOption, ProfileOption, RecipeOption, SetOption, chosen_recipe
from vitpipe.verbs.run_folders import check_run_place


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(run)


def run(
    stage: Annotated[
        str, typer.Argument(help="prepare, pretrain, ..., report", autocompletion=complete_stage)
    ],
    out: Annotated[Path | None, typer.Option("--out", help="output folder")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--in", help="NAME=DIR, may be repeated")] = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    state: Annotated[Path | None, typer.Option("--state", help="folder of resumable training states")] = None,
    states: Annotated[
        Path | None,
        typer.Option(
            "--states",
            envvar="VITPIPE_STATES",
            help="folder of the states of many runs, each named by what it trains; --state goes before",
        ),
    ] = None,
    executor_input: Annotated[str | None, typer.Option(help="Kubeflow's executor input, JSON")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="processes; one per GPU if not given")] = None,
) -> None:
    """Run one stage. dvc.yaml and the Kubeflow components call this.

    Without --in and --out the folders are those of dvc.yaml: artifacts/RECIPE/PROFILE/STAGE.
    """
    _become_a_rank(stage, ranks)
    from vitpipe.config.read import load_recipe
    from vitpipe.stages.run import run_stage

    chosen = chosen_recipe(recipe, profile, overrides, params)
    if executor_input is not None:
        from vitpipe.stages.executor import ExecutorIO

        io = ExecutorIO(executor_input)
        loaded = io.recipe(chosen.recipe, chosen.profile, chosen.overrides)
        io.check_code(loaded, stage)  # before any work: Kubeflow's cache would keep a result of other code
        out = io.output_folder()
        pipeline = io.pipeline_run(stage)
        io.finish(run_stage(stage, loaded, io.inputs(), out, state=state, states=states, pipeline=pipeline))
        return
    folders = _named_folders(inputs or ())
    loaded = load_recipe(chosen.recipe, chosen.profile, chosen.overrides)
    if out is None:
        if folders:
            raise typer.BadParameter(
                "give the output folder with --out DIR, or leave --in out, too", param_hint="--in"
            )
        folders, out = _own_folders(chosen, loaded, stage)
    run_stage(stage, loaded, folders, out, state=state, states=states)


def _become_a_rank(stage: str, ranks: int | None) -> None:
    """Start again under torchrun where several processes share the stage, and end with what started it."""
    from vitpipe.stages.launch import (
        die_with_starter,
        keep_freed_memory,
        num_ranks_wanted,
        restart_under_torchrun,
        share_the_cores,
        under_torchrun,
    )

    share_the_cores()  # sets OMP_WAIT_POLICY, which OpenMP reads when torch is imported
    keep_freed_memory()
    # Before the recipe is read: torchrun starts this very command again, once per GPU.
    if not under_torchrun() and (num_ranks := num_ranks_wanted(stage, ranks)) > 1:
        restart_under_torchrun(num_ranks, ranks)
    die_with_starter()  # after the restart, which would end the watch


def _own_folders(chosen: Any, loaded: Any, stage: str) -> tuple[dict[str, Path], Path]:
    """Inputs and output of a stage where dvc.yaml has them."""
    from vitpipe.config.read import run_folder
    from vitpipe.stages.identity import folders_of
    from vitpipe.stages.run import node_of

    run = run_folder(chosen.recipe, chosen.profile)
    check_run_place(run)
    own = folders_of(node_of(loaded, stage), run)
    return own.inputs, own.out


def _named_folders(texts: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, folder in map(_name_and_folder, texts):
        if name in folders:
            raise typer.BadParameter(f"the input '{hidden(name)}' is given twice", param_hint="--in")
        folders[name] = folder
    return folders


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise typer.BadParameter(f"'{hidden(text)}' is not of the form NAME=DIR", param_hint="--in")
    return name, Path(folder)
