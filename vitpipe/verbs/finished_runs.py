"""The verbs `report` and `verdict`: finished runs as one page, and beside the published rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.options import JsonOption, ParamsOption


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (report, verdict):
        app.command(name=verb.__name__)(verb)


def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs: artifacts/RECIPE/PROFILE")],
    out: Annotated[Path, typer.Option("--out", help="output folder")],
) -> None:
    """One self-contained page and Markdown from one or many runs."""
    from vitpipe.stages.report.stage import report_of_folders

    print(report_of_folders(runs, out))


def verdict(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="folders of runs; else the one of params.yaml")
    ] = None,
    params: ParamsOption = Path("params.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Show finished runs beside the published rows, demos beside our own reference; where the report is."""
    from vitpipe.config.params_file import load_params
    from vitpipe.config.read import run_folder
    from vitpipe.contracts.errors import ArtifactError
    from vitpipe.stages.report.stage import verdict_values_of_folders, verdicts_of_folders
    from vitpipe.track.server import store_address
    from vitpipe.track.ui_address import ui_lines

    if not runs:
        chosen = load_params(params)
        runs = [run_folder(chosen.recipe, chosen.profile)]
        # `vitpipe compile --dvc` makes empty folders.
        if not any(runs[0].glob("*/card.json")):
            raise ArtifactError(
                f"{chosen.recipe} has not run yet at profile {chosen.profile}",
                where=runs[0],
                fix="run `make demo` or `dvc repro` first, or give the folder of a run",
            )
    if as_json:
        print(json.dumps(verdict_values_of_folders(runs), indent=2))
        return
    print("\n".join(verdicts_of_folders(runs)))
    for folder in runs:
        print(f"Report: {folder / 'report' / 'report.html'}")
    print("\n".join(ui_lines(store_address(Path.cwd()))))
