"""The verbs `report` and `verdict`: finished runs as one page, and beside the published rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.options import JsonOption, ParamsOption
from vitpipe.verbs.run_folders import chosen_runs, store_of_run


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (report, verdict):
        app.command(name=verb.__name__)(verb)


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="folders of runs, artifacts/RECIPE/PROFILE; else the one of params.yaml"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="output folder")] = Path("build/report"),
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """One self-contained page and Markdown from one or many runs."""
    folders = chosen_runs(runs, params)  # before the imports, which take seconds
    from vitpipe.stages.report.stage import report_of_folders

    print(report_of_folders(folders, out))


def verdict(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="folders of runs; else the one of params.yaml")
    ] = None,
    params: ParamsOption = Path("params.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Show finished runs beside the published rows, demos beside our own reference; where the report is."""
    runs = chosen_runs(runs, params)
    from vitpipe.stages.report.stage import verdict_values_of_folders, verdicts_of_folders
    from vitpipe.track.ui_address import ui_lines

    if as_json:
        print(json.dumps(verdict_values_of_folders(runs), indent=2))
        return
    print("\n".join(verdicts_of_folders(runs)))
    for page in (folder / "report" / "report.html" for folder in runs):
        if page.is_file():
            print(f"Report: {page}")
    for store in dict.fromkeys(map(store_of_run, runs)):
        print("\n".join(ui_lines(store)))
