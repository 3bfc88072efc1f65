"""The verb `table`: show a published table, or run its rows and put our column beside the paper's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import counted
from vitpipe.verbs.completion import complete_profile, complete_table
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.show import print_progress, print_rows

if TYPE_CHECKING:
    from vitpipe.tables.run_table import Failure
    from vitpipe.tables.table_plan import TablePlan

_LOG_WIDTH = 160  # columns where there is no terminal, as in `verbs/show.py`

# Compiles a plan to a Kubeflow package: the engines' side registers it, because it lies above the verbs; the
# images do not hold it.
_compilers: list[Callable[[TablePlan], Path]] = []


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="table")(table)


def use_compiler(compiler: Callable[[TablePlan], Path]) -> None:
    """Let the plan of a table be compiled by this function, which returns the package's path."""
    _compilers[:] = [compiler]


def table(
    name: Annotated[
        str, typer.Argument(help="PAPER/NUMBER, for example itpn/11", autocompletion=complete_table)
    ],
    run: Annotated[bool, typer.Option("--run", help="run the rows that recipes claim")] = False,
    profile: Annotated[
        str, typer.Option("--profile", help="demo, full, ...", autocompletion=complete_profile)
    ] = "demo",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs per recipe, by seed")] = 1,
    row: Annotated[
        list[str] | None, typer.Option("--row", help="KEY=VALUE, only these rows, may be repeated")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for every recipe")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="with --run: show the plan, start nothing")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="with --run: start also what needs real data")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a published table; with --run our results beside it, mean and spread over --seeds.

    Profiles that need real data, such as full, are planned and compiled for Kubeflow; --yes trains here.
    """
    from vitpipe.papers.published import table as published

    paper, _, number = name.partition("/")
    if not run:
        for option, given in (("--row", row), ("--set", overrides), ("--plan", plan_only), ("--yes", yes)):
            if given:
                raise typer.BadParameter("it acts on the runs of a table: add --run", param_hint=option)
        print_rows(published(paper, number), as_json, name)
        return
    from vitpipe.tables.table_plan import plan_table

    plan = plan_table(
        paper, number, profile, num_seeds=seeds, overrides=overrides or (), conditions=row or ()
    )
    # Embedded data are the mark of what a laptop finishes in minutes; anything else may take GPU-weeks.
    is_small = all(item.recipe.data.source == "embedded" for item in plan.runs)
    if plan_only or not (is_small or yes):
        _show_plan(plan, as_json, compiles=not is_small)
        return
    _run(plan, as_json)


def _run(plan: TablePlan, as_json: bool) -> None:
    from vitpipe.tables.run_table import Progress, run_table

    progress = Progress(0, {})
    try:
        run_table(plan, print_progress, progress)
    finally:
        # Also what an interrupted call has finished.
        if progress.num_stages or not sys.exc_info()[0]:
            _show_result(plan, progress.failures, as_json)
    if progress.failures:
        raise typer.Exit(1)


def _show_plan(plan: TablePlan, as_json: bool, *, compiles: bool) -> None:
    from vitpipe.tables.run_table import planned_stages
    from vitpipe.tables.table_results import command_of

    stages = planned_stages(plan)
    package = _package_of(plan) if compiles else None
    num_steps = sum(item["steps"] or 0 for item in stages)
    unclaimed = [item for item in plan.rows if not item.claims]
    if as_json:
        shown = {
            "table": plan.name,
            "stages": stages,
            "num_steps": num_steps,
            "num_unclaimed": len(unclaimed),
        }
        print(json.dumps({**shown, "package": str(package or "")}, indent=2))
        return
    print_rows(stages_by_run(stages), False, f"{plan.name}, profile {plan.profile}", right=("steps",))
    counts = [sum(item["does"] == kind for item in stages) for kind in ("runs", "shared", "finished")]
    print(
        f"{counted(len(plan.rows), 'row')}, {len(unclaimed)} of them without a recipe; "
        f"{counted(counts[0], 'stage')} to run ({counted(num_steps, 'optimiser step')}), "
        f"{counts[1]} shared, {counts[2]} finished"
    )
    if package is not None:
        print(f"Kubeflow package: {package}")
    if compiles:
        print(with_typed_commands(f"Nothing was started. To train here: `{command_of(plan)} --yes`"))


def _package_of(plan: TablePlan) -> Path | None:
    """The plan as a Kubeflow package; None without the engines, or where the plan suits no cluster."""
    if not _compilers:
        return None
    try:
        return _compilers[0](plan)
    except VitpipeError as error:
        # Only an offer beside the plan: a batch that eight GPUs cannot share can still be trained here.
        print(with_typed_commands(f"No Kubeflow package: {error}"), file=sys.stderr)
        return None


def stages_by_run(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run: hundreds of stages are too many to read."""
    rows: dict[str, dict[str, Any]] = {}
    for item in stages:
        row = rows.setdefault(
            item["run"], {"run": item["run"], "runs": "", "shared": "", "finished": "", "steps": 0}
        )
        row[item["does"]] = f"{row[item['does']]} {item['stage']}".strip()
        row["steps"] += item["steps"] or 0
    return [{**row, "steps": f"{row['steps']:,}" if row["steps"] else ""} for row in rows.values()]


def _show_result(plan: TablePlan, failures: dict[str, Failure], as_json: bool) -> None:
    from vitpipe.report.seed_results import plain_rows
    from vitpipe.report.table_page import table_lines, write_table_files
    from vitpipe.tables.finished_table import send_table
    from vitpipe.tables.table_results import table_report

    report = table_report(plan, failures)
    files = write_table_files(report, plan.folder)
    if as_json:
        rows = plain_rows(report.results)
        shown: dict[str, Any] = {"table": plan.name, "profile": plan.profile, "num_seeds": plan.num_seeds}
        print(json.dumps({**shown, "rows": rows, "failures": list(report.failures)}, indent=2))
    else:
        is_terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else _LOG_WIDTH
        print("\n".join(table_lines(report, width=width, colour=is_terminal)))
        for path in files.values():
            print(f"Written: {path}")
    send_table(plan, report, files, partial(print, file=sys.stderr))
