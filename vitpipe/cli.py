"""The command line: verbs only. Nothing heavy is imported before a verb needs it.

Exit code 0: done; 1: the work failed; 2: the input was wrong. Errors are one paragraph on stderr.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitpipe.config.plugins import params_of, use_plugins_of
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import VitpipeError, shortened, with_short_values
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import counted
from vitpipe.verbs import (
    benchmark,
    check_pod,
    clean,
    compare_table,
    conclude_run,
    datasets,
    doctor,
    explain,
    finished_runs,
    launch_stage,
    models,
    recipes,
    references,
    run_stage,
    table,
)
from vitpipe.verbs.completion import complete_recipe, typed_so_far
from vitpipe.verbs.options import (
    JsonOption,
    ParamsOption,
    ProfileOption,
    RecipeOption,
    SetOption,
    chosen_recipe,
)
from vitpipe.verbs.run_folders import check_run_place, check_runs_folder
from vitpipe.verbs.show import print_rows, warn_of


class _Verbs(TyperGroup):
    """The command line; its usage errors show long arguments shortened, addresses without credentials."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _short_usage_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _short_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _short_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own copy of click does not export the class
            error.message = with_short_values(hidden(error.message))  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="vitpipe",
    cls=_Verbs,
    help="From raw images to a table that stands beside the paper's table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # rich's tracebacks print local variables, passwords among them
)


def _load(chosen: Any) -> Any:
    """The recipe that was chosen."""
    from vitpipe.config.read import load_recipe

    return load_recipe(chosen.recipe, chosen.profile, chosen.overrides)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vitpipe {version('vitpipe')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="show the version")
    ] = False,
) -> None:
    pass


run_stage.register(app)


@app.command()
def identity(
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for one JSON file per stage; else dvc.yaml's")
    ] = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Write each stage's identity (digests of recipe, code, image); DVC depends on these files."""
    from vitpipe.config.read import run_folder
    from vitpipe.papers.published import check_expected
    from vitpipe.stages.chain_run import begin_chain
    from vitpipe.stages.identity import IDENTITY, check_dvc_file, check_stage_folders, write_identities

    chosen = chosen_recipe(recipe, profile, overrides, params)
    loaded = _load(chosen)
    # DVC runs this verb first, so a graph that does not fit stops before any stage.
    check_expected(loaded)
    check_dvc_file(loaded, Path("dvc.yaml"))
    run = run_folder(chosen.recipe, chosen.profile)
    check_run_place(run)
    if out is None:
        check_stage_folders(loaded, run)
        begin_chain(loaded, run)
    write_identities(loaded, out or run / IDENTITY)


@app.command()
def plan(
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    artifacts: Annotated[Path, typer.Option(help="folder of finished stages")] = Path("artifacts"),
    ranks: Annotated[int, typer.Option(min=1, help="GPUs that share a training stage")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show which stages would run and why, their steps, and disk and time of the data. Starts nothing."""
    from vitpipe.config.read import run_folder
    from vitpipe.contracts.graph import graph_of
    from vitpipe.datasets.set_sizes import prepared_train_sizes
    from vitpipe.papers.published import check_expected
    from vitpipe.prepare.packing_cost import pack_speed, plan_rows, shown_rows
    from vitpipe.stages.identity import check_dvc_folder, forecast
    from vitpipe.stages.resolved import training_steps
    from vitpipe.verbs.graph_tree import graph_tree

    chosen = chosen_recipe(recipe, profile, overrides, params)
    loaded = _load(chosen)
    check_expected(loaded)
    run = run_folder(chosen.recipe, chosen.profile, artifacts)
    check_run_place(run)
    found = forecast(loaded, run)
    # What `prepare` has counted, unless it would run again.
    is_prepared = any(item.stage == "prepare" and not item.runs for item in found)
    steps = training_steps(loaded, ranks, prepared_train_sizes(run / "prepare") if is_prepared else None)
    rows = [
        {
            "stage": item.stage,
            "runs": "cannot run" if item.missing else "runs" if item.runs else "cached",
            "steps": steps.get(item.stage, ""),
            "why": item.missing or item.why,
        }
        for item in found
    ]
    if as_json:
        print(json.dumps({"stages": rows, "data": plan_rows(loaded.data)}, indent=2, default=str))
        return
    warn_of(check_dvc_folder, Path.cwd())
    print("\n".join(graph_tree(graph_of(loaded.stages, loaded.start_from))))
    print_rows(rows, False, f"{loaded.name}, profile {loaded.profile}")
    print_rows(shown_rows(loaded.data), False, f"Data, packed at {pack_speed()}")


@app.command(name="recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="for example itpn/pixel_base", autocompletion=complete_recipe)],
    profile: ProfileOption = None,
    overrides: SetOption = None,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs that share a training stage")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show one recipe: every value, and every derived value with its reason."""
    from vitpipe.stages.resolved import resolved_rows

    loaded = _load(chosen_recipe(name, profile, overrides, Path("params.yaml")))
    rows = [dataclasses.asdict(reason) for reason in resolved_rows(loaded, ranks)]
    if as_json:
        print(json.dumps({"recipe": loaded.model_dump(mode="json"), "derived": rows}, indent=2))
        return
    import yaml

    # In the order of the recipe's fields, which is that of the stages.
    print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, width=100))
    shown = [
        {**row, "value": f"{row['value']:.6g}" if isinstance(row["value"], float) else row["value"]}
        for row in rows
    ]
    print_rows(shown, False, "Derived values")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="official checkpoint (.pth)")],
    out: Annotated[Path, typer.Option("--out", help="safetensors file to write")],
    entry: Annotated[str | None, typer.Option(help="which weights of the file, e.g. state_dict_ema")] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert an official checkpoint to safetensors, with a report on every key."""
    from vitpipe.models.convert import convert as convert_file

    report = convert_file(checkpoint, out, entry=entry)
    print_rows(report.table(), as_json, f"{checkpoint.name}: {report.summary()}")
    if report.note:
        # Not on stdout, which --json leaves to the rows.
        print(report.note, file=sys.stderr)


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(help="folder with undelivered records")] = Path("artifacts"),
) -> None:
    """Send to MLflow what it did not receive, for example because the server was unreachable."""
    from vitpipe.track.sync import sync_pending

    check_runs_folder(folder)
    print(f"{counted(sync_pending(folder), 'run')} sent")


@app.command(hidden=True)
def send(folder: Annotated[Path, typer.Argument()] = Path("artifacts")) -> None:
    """Former name of `sync`, kept for one version."""
    print("`vitpipe send` is now `vitpipe sync`; the old name goes with the next version", file=sys.stderr)
    sync(folder)


for verbs in (recipes, models, table, references, finished_runs, explain, datasets, doctor, benchmark, clean):
    verbs.register(app)
launch_stage.register(app)
conclude_run.register(app)
compare_table.register(app)
check_pod.register(app)


def _mount_engine_verbs() -> None:
    """`compile`, `local` and `submit` belong to the Kubeflow side; the images do not hold it."""
    try:
        from pipelines.verbs import register
    except ModuleNotFoundError:
        return
    register(app)


def main() -> None:
    """Entry point: run a verb; a typed error becomes one paragraph and an exit code."""
    # A name in somebody's file may hold what the terminal's encoding has not, half a surrogate pair for
    # example; where output is no terminal it may be replaced by an object that cannot change.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _use_plugins()
        _mount_engine_verbs()
        app()
    except SystemExit as error:
        # Typer ends with this code after Ctrl-C, without a word.
        if error.code == 128 + signal.SIGINT:
            print("vitpipe: Interrupted by Ctrl-C.", file=sys.stderr)
        raise
    except VitpipeError as error:
        print(f"vitpipe: {with_typed_commands(str(error))}", file=sys.stderr)
        # A rank has imported it. Here an import could fail for the very reason that was just said.
        if launch := sys.modules.get("vitpipe.stages.launch"):
            launch.tell_torchrun(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if _is_about_a_path(error):
            print(f"vitpipe: {_about_the_path(error)}", file=sys.stderr)
            sys.exit(2)
        # A defect of ours keeps its traceback, without the credentials that a library may quote there.
        print(hidden(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


def _use_plugins() -> None:
    """Use the plugins of the params file that the command line names.

    Raises:
        VitpipeError: as `use_plugins_of`, but not where a shell completes names, which shows no errors.
    """
    typed = typed_so_far()
    with nullcontext() if typed is None else suppress(Exception):
        use_plugins_of(params_of(sys.argv[1:] if typed is None else typed))


def _is_about_a_path(error: Exception) -> bool:
    """Whether the file system refused a path: the user's mistake, as far as anybody can tell."""
    named = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    return named and not os.environ.get("VITPIPE_TRACEBACK")


def _about_the_path(error: Any) -> str:
    # A path stays whole, to be found; one that is too long is nowhere.
    path = shortened(error.filename) if error.errno == errno.ENAMETOOLONG else hidden(str(error.filename))
    return (
        f"The file system refused a path ({error.strerror}). Where: {path}. "
        "Fix: check this path and the options that name it; with VITPIPE_TRACEBACK=1 in the environment the "
        "same command shows where it happened."
    )
