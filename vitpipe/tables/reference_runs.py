"""References of the demos: which runs they take, and what finished runs give.

The runs, their folders and how they go on are those of a published table (`run_table.py`). Only what is
wanted of a recipe differs: the numbers that its verdict shows and every stage's main metric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vitpipe.config.read import ARTIFACTS, load_recipe
from vitpipe.config.recorded import recorded_values
from vitpipe.contracts.artifact import Artifact, open_artifact
from vitpipe.papers.recorded_results import PROFILE, Reference, ReferenceRow
from vitpipe.report.reference import ComparedMetric, compared_metrics, printed_decimals
from vitpipe.tables.table_plan import FinishedStages, RunPlan, TableRun, plan_runs

_UNKNOWN = "unknown"


def plan_references(names: Sequence[str], num_seeds: int, *, root: Path = ARTIFACTS) -> RunPlan:
    """Plan the runs that the references of these recipes take; starts nothing.

    Args:
        names: of recipes, as the command line takes them.
        root: the folder of all runs.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    recipes = {name: load_recipe(name, PROFILE) for name in dict.fromkeys(names)}
    wanted = {name: {item.stage for item in compared_metrics(recipe)} for name, recipe in recipes.items()}
    return RunPlan(
        title="references",
        profile=PROFILE,
        num_seeds=num_seeds,
        overrides=(),
        runs=plan_runs(recipes, wanted, num_seeds, (), root),
        folder=root / "references" / PROFILE,
    )


def finished_references(plan: RunPlan) -> tuple[Reference, ...]:
    """The references of all recipes of the plan whose runs are finished at every seed."""
    finished = FinishedStages(plan.runs)
    names = dict.fromkeys(run.name for run in plan.runs)
    found = (_reference(plan.runs_of(name), finished) for name in names)
    return tuple(item for item in found if item is not None)


def _reference(runs: Sequence[TableRun], finished: FinishedStages) -> Reference | None:
    """What the seeds of one recipe give; None while something of them is missing."""
    by_seed: list[dict[str, Artifact]] = []
    for run in runs:
        folders = {stage: finished.folder(run, stage) for stage in run.stages}
        by_seed.append({s: open_artifact(f, s) for s, f in folders.items() if f is not None})
        if len(by_seed[-1]) < len(folders):
            return None
    recipe = runs[0].recipe
    # An artifact that several seeds share counts once, which makes no difference to a set of names.
    every = [artifact for artifacts in by_seed for artifact in artifacts.values()]
    return Reference(
        recipe=recipe.name,
        profile=recipe.profile,
        seeds=tuple(run.recipe.seed for run in runs),
        processors=_known(str(item.run.hardware.get("processor", "")) for item in every),
        commits=_known(item.run.git_commit for item in every),
        measured_on=max(item.run.started_at for item in every)[:10] or _UNKNOWN,
        data_digest=every[0].card.data_digest,
        rows=tuple(_rows(compared_metrics(recipe), by_seed)),
        values=recorded_values(recipe),
    )


def _rows(
    metrics: Iterable[ComparedMetric], by_seed: Sequence[dict[str, Artifact]]
) -> Iterator[ReferenceRow]:
    for item in metrics:
        values = [artifacts[item.stage].metrics.get(item.metric, math.nan) for artifacts in by_seed]
        # What one seed did not measure, or did not measure as a number, has no range.
        if not all(map(math.isfinite, values)):
            continue
        scaled = [value * item.scale for value in values]
        yield ReferenceRow(
            stage=item.stage,
            metric=item.metric,
            unit=item.unit,
            scale=item.scale,
            decimals=printed_decimals(item.unit, scaled),
            mean=statistics.fmean(scaled),
            minimum=min(scaled),
            maximum=max(scaled),
            spread=statistics.stdev(scaled),
        )


def _known(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once, without empty ones: a folder that DVC has fetched has no record of its run."""
    return tuple(dict.fromkeys(text for text in texts if text)) or (_UNKNOWN,)
