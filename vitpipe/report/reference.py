"""Compare a demo with our own recorded results of the same recipe. Pure functions.

reproduced      inside the recorded range, widened by one unit of the last digit that is printed
within noise    at most three standard deviations from the recorded mean
above, below    farther away (higher or lower, not better or worse)
not comparable  other acting recipe values (the seed aside), other data or other inputs; the reason is given
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError, some
from vitpipe.contracts.graph import graph_of
from vitpipe.papers.published import find_row
from vitpipe.papers.recorded_results import COMMAND, PROFILE, RECIPES, Reference, ReferenceRow, find_reference
from vitpipe.report.compare import JUDGEMENTS, Judgement
from vitpipe.report.recipe_differences import acting_values, chain_of, differences, edges_of
from vitpipe.report.result_tables import is_percent
from vitpipe.report.results import RunResults

NUM_DEVIATIONS = 3
_PERCENT_DECIMALS, _SIGNIFICANT_DIGITS = 2, 4
# In binary 85.5 - 85.3 is slightly more than 0.2.
_ROUNDING = 1e-9
# Keys of a recipe that describe it. All others decide something and are recorded.
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class ComparedMetric:
    """A number of a stage that references have; `scale` turns it into `unit`."""

    stage: str
    metric: str
    unit: str
    scale: float


@dataclass(frozen=True)
class ReferenceVerdict:
    """One metric compared with its recorded results; numbers are in `unit`.

    Attributes:
        ours: None when the stage or the metric is missing.
        row: None when there are no recorded results.
    """

    stage: str
    metric: str
    unit: str
    ours: float | None
    row: ReferenceRow | None
    judgement: Judgement
    reason: str

    @property
    def delta(self) -> float | None:
        """Ours minus the recorded mean; None when not comparable."""
        if self.row is None or self.ours is None or self.judgement == "not comparable":
            return None
        return self.ours - self.row.mean


@dataclass(frozen=True)
class ReferenceComparison:
    """A run beside the recorded results of its recipe.

    Attributes:
        recipe: its name.
        reference: None when none are recorded; `missing` then says what to do.
    """

    recipe: str
    reference: Reference | None
    missing: str
    verdicts: tuple[ReferenceVerdict, ...]

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Each reason why something is not comparable, with its stages; in the order of the rows."""
        found: dict[str, dict[str, None]] = {}  # an inner dict is an ordered set
        for item in self.verdicts:
            if item.judgement == "not comparable" and self.reference is not None:
                found.setdefault(item.reason, {})[item.stage] = None
        return [(reason, list(stages)) for reason, stages in found.items()]


def compared_metrics(recipe: Recipe) -> tuple[ComparedMetric, ...]:
    """What a recipe's references have: the numbers of its `expect`, and every stage's main metric.

    Raises:
        RecipeError: when an expectation does not select exactly one published row.
    """
    found: dict[tuple[str, str], ComparedMetric] = {}
    for item in recipe.expect:
        unit = str(find_row(recipe.source.paper, item.where)["unit"])
        found.setdefault((item.stage, item.metric), ComparedMetric(item.stage, item.metric, unit, item.scale))
    order = [node.name for node in graph_of(recipe.stages, recipe.start_from)]
    for node in graph_of(recipe.stages, recipe.start_from):
        if metric := node.stage.headline:
            unit, scale = ("percent", 100.0) if is_percent(metric) else ("", 1.0)
            found.setdefault((node.name, metric), ComparedMetric(node.name, metric, unit, scale))
    # An expectation may name a stage that the profile has left out.
    return tuple(sorted((c for c in found.values() if c.stage in order), key=lambda c: order.index(c.stage)))


def printed_decimals(unit: str, values: Sequence[float]) -> int:
    """Digits after the point with which recorded numbers are printed.

    Two for a percentage, as in the verdict table; as many as give four significant digits otherwise.
    """
    largest = max((abs(value) for value in values), default=0.0)
    if unit == "percent" or largest == 0.0:
        return _PERCENT_DECIMALS
    return min(12, max(0, _SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(largest))))


def judge_by_reference(ours: float, row: ReferenceRow, num_seeds: int) -> tuple[Judgement, str]:
    """Judgement and its reason for a number in the row's unit; both limits are inclusive."""
    digit = 10.0**-row.decimals
    slack = _ROUNDING * max(1.0, abs(ours), abs(row.mean))
    if row.minimum - digit - slack <= ours <= row.maximum + digit + slack:
        is_inside = row.minimum - slack <= ours <= row.maximum + slack
        place = "inside" if is_inside else "at most one printed digit outside"
        low, high = (f"{value:.{row.decimals}f}" for value in (row.minimum, row.maximum))
        return "reproduced", f"{place} the range of {num_seeds} seeds, {low} to {high}"
    if abs(ours - row.mean) <= NUM_DEVIATIONS * row.spread + slack:
        return "within noise", "at most three standard deviations from the mean"
    # Not "better" or "worse": for a loss, less is better.
    side: Judgement = "above" if ours > row.mean else "below"
    return side, "more than three standard deviations from the mean"


def comparison_of(run: RunResults) -> ReferenceComparison | None:
    """A demo beside the recorded results of its recipe; None at profiles that have none.

    Raises:
        InputError: when a file of recorded results cannot be read.
        RecipeError: when an expectation does not select exactly one published row.
    """
    recipe: Recipe = run.recipe
    if recipe.profile != PROFILE:
        return None
    reference = find_reference(recipe.name, recipe.profile)
    command = COMMAND if recipe.name in RECIPES else f"vitpipe references --recipe {shlex.quote(recipe.name)}"
    missing = "" if reference else f"no reference: run `{command}`"
    metrics = compared_metrics(recipe)
    why = {
        stage: _why_not(run, stage, reference, missing) for stage in dict.fromkeys(c.stage for c in metrics)
    }
    verdicts = tuple(_verdict(run, item, reference, why[item.stage]) for item in metrics)
    return ReferenceComparison(recipe.name, reference, missing, verdicts)


def counts_by_reference(comparisons: Sequence[ReferenceComparison | None]) -> dict[str, float]:
    """`num_reference`, and how many of them are `num_reference_reproduced`, ..., as flat metrics."""
    judged = [item.judgement for found in comparisons if found is not None for item in found.verdicts]
    # All of them, as in `compare.counts_of`: a metric that is absent in some runs cannot be compared.
    counted = {f"num_reference_{name.replace(' ', '_')}": float(judged.count(name)) for name in JUDGEMENTS}
    return {"num_reference": float(len(judged)), **counted}


def _verdict(
    run: RunResults, item: ComparedMetric, reference: Reference | None, why: str
) -> ReferenceVerdict:
    artifact = run.artifacts.get(item.stage)
    measured = artifact.metrics.get(item.metric) if artifact else None
    row = reference.row(item.stage, item.metric) if reference else None
    # In the recorded unit: that of the recipe may have changed since.
    unit, scale = (row.unit, row.scale) if row else (item.unit, item.scale)
    ours = None if measured is None else measured * scale
    reason = why
    if not reason and ours is None:
        reason = f"stage {item.stage} did not measure {item.metric}"
    elif not reason and row is None:
        reason = f"{item.metric} is not among the recorded results: run `{COMMAND}`"
    elif not reason and ours is not None and not math.isfinite(ours):
        reason = f"{item.metric} is not a finite number"
    judgement: Judgement = "not comparable"
    if not reason and ours is not None and row is not None and reference is not None:
        judgement, reason = judge_by_reference(ours, row, len(reference.seeds))
    return ReferenceVerdict(item.stage, item.metric, unit, ours, row, judgement, reason)


def _why_not(run: RunResults, stage: str, reference: Reference | None, missing: str) -> str:
    """Why nothing of a stage can be compared, from the facts of its run; empty when it can."""
    if reference is None:
        return missing
    if stage not in run.artifacts:
        return f"stage {stage} did not run"
    chain = chain_of(run.nodes(), stage)
    if found := [run.mismatches[node.name] for node in chain if node.name in run.mismatches]:
        return found[0]
    try:
        recorded = _recorded_recipe(reference)
    except (ValidationError, InputError):
        return f"this version cannot read the recipe that the reference was run with: run `{COMMAND}`"
    theirs = chain_of(graph_of(recorded.stages, recorded.start_from), stage)
    if edges_of(chain) != edges_of(theirs):
        names, others = (", ".join(node.name for node in nodes) for nodes in (chain, theirs))
        return f"the chain of {stage} is {names}; that of the reference is {others or 'without this stage'}"
    if changed := differences(acting_values(run.recipe, chain), acting_values(recorded, theirs)):
        return f"the recipe has other values than that of the reference: {some(list(changed.values()))}"
    digest = run.artifacts[stage].card.data_digest
    if digest != reference.data_digest:
        shown, wanted = (text[:_SHOWN_DIGITS] or "unknown" for text in (digest, reference.data_digest))
        return f"the stage has read other data than the reference (digest {shown}, not {wanted})"
    return ""


def _recorded_recipe(reference: Reference) -> Recipe:
    """The recipe that the recorded results were run with; keys that are new since have their defaults."""
    described = {"name": reference.recipe, "profile": reference.profile, "summary": ""}
    source = {"paper": "", "title": ""}
    return Recipe.model_validate({**reference.values, **described, "source": source})
