"""The finished runs of a table beside its published rows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.units import format_duration
from vitpipe.report.comparability import Reason, published_recipe, reasons_of
from vitpipe.report.results import RunResults
from vitpipe.report.seed_results import SeedResults, results_over_seeds, without_recipe
from vitpipe.report.table_page import TableReport
from vitpipe.tables.claims import Claim, TableRow
from vitpipe.tables.run_table import Failure
from vitpipe.tables.table_plan import FinishedStages, TablePlan, TableRun


class Stages(Protocol):
    """Where the finished stages of a table's runs lie."""

    def folder(self, run: TableRun, stage: str) -> Path | None:
        """The finished output; None when there is none."""


def table_report(
    plan: TablePlan, failures: Mapping[str, Failure], finished: Stages | None = None
) -> TableReport:
    """Read what is finished and compare it; rows without a result say why.

    Args:
        failures: title of a run -> what failed in it.
        finished: the stages; by default those in the folders of the plan.
    """
    finished = finished or FinishedStages(plan.runs)
    results = tuple(
        item
        for row in plan.rows
        for item in (
            named_best(
                [_searched(claim) for claim in row.claims],
                [_compared(plan, row, claim, finished, failures) for claim in row.claims],
            )
            or [without_recipe(row.published)]
        )
    )
    claims = [claim for row in plan.rows for claim in row.claims]
    source = claims[0].recipe.source
    return TableReport(
        name=plan.name,
        source=str(plan.rows[0].published["source"]),
        title=source.title,
        profile=plan.profile,
        num_seeds=plan.num_seeds,
        command=command_of(plan),
        results=results,
        runs=tuple(_run_rows(plan, finished)),
        failures=tuple(f"{title}, stage {item.stage}: {item.message}" for title, item in failures.items()),
        discrepancies=tuple(dict.fromkeys(text for claim in claims for text in claim.recipe.discrepancies)),
    )


def named_best(searched: Sequence[tuple[str, object]], results: Sequence[SeedResults]) -> list[SeedResults]:
    """The results of one row; of several with the same searched key, the highest says that it was chosen.

    Args:
        searched: `Expectation.searched` of each, and the value that its recipe has there. Where a profile
            leaves one value, nothing was searched.
        results: of the recipes that claim the row.
    """
    named = list(results)
    for key in filter(None, dict.fromkeys(key for key, _ in searched)):
        group = [i for i, (other, _) in enumerate(searched) if other == key]
        values = list(dict.fromkeys(str(searched[i][1]) for i in group))
        measured = [i for i in group if named[i].mean is not None]
        done = list(dict.fromkeys(str(searched[i][1]) for i in measured))
        if len(done) < 2:
            continue
        best = max(measured, key=lambda i: named[i].mean or 0.0)
        count = f"{len(done)} of {len(values)}" if len(done) < len(values) else f"{len(values)}"
        text = (
            f"the best of {count} searched values of {key} "
            f"({searched[best][1]} of {', '.join(sorted(done))}), chosen by the images that it is reported on"
        )
        reason = "; ".join(filter(None, (named[best].reason, text)))
        named[best] = replace(named[best], reason=reason)
    return named


def _searched(claim: Claim) -> tuple[str, object]:
    """The key whose values were searched, and the recipe's value; `None` without such a section."""
    value: object = claim.recipe
    for name in filter(None, claim.expectation.searched.split(".")):
        value = getattr(value, name, None)
    return claim.expectation.searched, value


def command_of(plan: TablePlan) -> str:
    """The command that makes this table, with its own quotes."""
    seeds = [] if plan.num_seeds == 1 else ["--seeds", str(plan.num_seeds)]
    settings = [part for text in plan.overrides for part in ("--set", text)]
    return shlex.join(["vitpipe", "table", plan.name, "--run", "--profile", plan.profile, *seeds, *settings])


def _compared(
    plan: TablePlan,
    row: TableRow,
    claim: Claim,
    finished: Stages,
    failures: Mapping[str, Failure],
) -> SeedResults:
    metrics: dict[int, Mapping[str, float]] = {}
    reasons: dict[Reason, None] = {}  # an ordered set
    published = published_recipe(claim.recipe, claim.expectation)
    why: list[str] = []
    not_run: list[str] = []
    stage = claim.expectation.stage
    for run in plan.runs_of(claim.name):
        folder = finished.folder(run, stage) if stage in run.stages else None
        if folder is not None:
            metrics[run.recipe.seed] = open_artifact(folder, stage).metrics
            results = _results_of(run, finished)
            reasons |= dict.fromkeys(reasons_of(results, claim.expectation, published))
        elif stage not in run.stages:
            why.append(f"the recipe has no stage {stage} at profile {plan.profile}")
        elif run.title in failures:
            why.append(f"seed {run.recipe.seed}: stage {failures[run.title].stage} failed")
        else:
            not_run.append(str(run.recipe.seed))
    if not_run:
        seeds = f"seeds {', '.join(not_run)} have" if len(not_run) > 1 else f"seed {not_run[0]} has"
        why.append(f"{seeds} not run")
    return results_over_seeds(
        row.published,
        claim.name,
        claim.expectation,
        metrics,
        reasons=tuple(reasons),
        missing=", ".join(dict.fromkeys(why)),
    )


def _results_of(run: TableRun, finished: Stages) -> RunResults:
    """The finished stages of a run, wherever they lie; identities and inputs were compared to find them."""
    folders = {stage: finished.folder(run, stage) for stage in run.stages}
    found = {stage: open_artifact(folder, stage) for stage, folder in folders.items() if folder is not None}
    return RunResults(run.recipe, found)


def _run_rows(plan: TablePlan, finished: Stages) -> Iterator[dict[str, str]]:
    """One row per finished stage folder, with all runs that use it."""
    used: dict[Path, list[str]] = {}
    for run in plan.runs:
        for stage in run.stages:
            if (folder := finished.folder(run, stage)) is not None:
                used.setdefault(folder, []).append(run.title)
    for folder, titles in used.items():
        artifact = open_artifact(folder)
        others = len(titles) - 1
        yield {
            "run": titles[0] + (f" and {others} more" if others else ""),
            "stage": artifact.card.stage,
            "time": format_duration(artifact.run.wall_seconds),
            "folder": str(folder),
        }
