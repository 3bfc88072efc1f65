"""The verb `references`: run the demos over several seeds and record what a demo's verdict compares with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitpipe.verbs.completion import complete_recipe
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.show import print_progress, print_rows
from vitpipe.verbs.table import stages_by_run

if TYPE_CHECKING:
    from vitpipe.papers.recorded_results import Reference
    from vitpipe.tables.table_plan import RunPlan


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="references")(references)


def references(
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="recipe name, may be repeated; else the demos of the README",
            autocompletion=complete_recipe,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="runs per recipe, by seed")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write; else papers/demo.yaml of the package")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="show the plan, start nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the demo of recipes over several seeds and record mean, range and spread of their results.

    Finished runs are reused and an interrupted one goes on, as with `vitpipe table --run`. `vitpipe verdict`
    and the report compare a demo with these results.
    """
    from vitpipe.papers.recorded_results import RECIPES, REFERENCE_FILE, read_references
    from vitpipe.tables.reference_runs import plan_references
    from vitpipe.tables.run_table import planned_stages

    path = out or REFERENCE_FILE
    read_references(path)  # a file that cannot be kept is refused before hours of work, not after
    plan = plan_references(recipe or RECIPES, seeds)
    if plan_only:
        rows = planned_stages(plan)
        if as_json:
            print_rows(rows, True)
            return
        print_rows(stages_by_run(rows), False, f"references, profile {plan.profile}", right=("steps",))
        return
    _run(plan, path, as_json)


def _run(plan: RunPlan, path: Path, as_json: bool) -> None:
    from vitpipe.papers.recorded_results import write_references
    from vitpipe.tables.reference_runs import finished_references
    from vitpipe.tables.run_table import Progress, run_table

    progress = Progress(0, {})
    run_table(plan, print_progress, progress)
    # All recipes at once and at the end: the file is part of the package, so stages that run after it has
    # changed would record a commit with changes.
    found = finished_references(plan)
    if found:
        write_references(path, found)
    failures = [f"{title}, stage {item.stage}: {item.message}" for title, item in progress.failures.items()]
    if as_json:
        shown = {"file": str(path), "references": [item.model_dump(mode="json") for item in found]}
        print(json.dumps({**shown, "failures": failures}, indent=2))
    else:
        for item in found:
            _show(item)
        if found:
            print(f"Written: {path}")
    for line in failures:
        print(f"Failed: {line}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _show(item: Reference) -> None:
    from vitpipe.report.reference_table import provenance

    rows = [
        {
            "metric": f"{row.stage} {row.metric}",
            "mean": f"{row.mean:.{row.decimals}f}",
            "sd": f"{row.spread:.{row.decimals}f}",
            "range": f"{row.minimum:.{row.decimals}f} to {row.maximum:.{row.decimals}f}",
            "unit": row.unit,
        }
        for row in item.rows
    ]
    print_rows(rows, False, f"{item.recipe}: {provenance(item)}", right=("mean", "sd", "range"))
