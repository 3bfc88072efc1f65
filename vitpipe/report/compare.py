"""Compare our results with the published ones. Pure functions.

reproduced      equal at the precision at which the number was published
within noise    the difference is at most the tolerance of the recipe
above, below    the difference is larger than the tolerance (higher or lower, not better or worse)
not comparable  the facts of the run differ from those of the row (comparability.py), or there is no number
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitpipe.config.recipe import Expectation, Recipe
from vitpipe.papers.published import find_row
from vitpipe.report.comparability import Reason, published_recipe, reasons_of
from vitpipe.report.protocol_ledger import LedgerRow, ledger_of
from vitpipe.report.results import RunResults, once_per_run

Judgement = Literal["reproduced", "within noise", "above", "below", "not comparable"]
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)
# In binary 85.5 - 85.3 is slightly more than 0.2, and would be outside of a tolerance of 0.2.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """One published row compared with our result; numbers are in the row's unit.

    Attributes:
        ours: None when the stage or the metric is missing.
        published: as printed; a text where the row is not a number.
        delta: ours minus published; None when not comparable.
        ledger: how the number was measured, beside the published settings.
        kinds: of the reasons why it is not comparable, for a summary.
    """

    stage: str
    metric: str
    ours: float | None
    published: float | str
    unit: str
    delta: float | None
    tolerance: float
    judgement: Judgement
    reason: str
    row: Mapping[str, Any]
    ledger: tuple[LedgerRow, ...]
    kinds: tuple[str, ...] = ()

    @property
    def decimals(self) -> int:
        """Digits after the point of the published number as printed."""
        return num_decimals(self.published) if isinstance(self.published, int | float) else 0

    @property
    def title(self) -> str:
        """The row's metric and dataset."""
        return f"{self.row['metric']}, {self.row['dataset']}"


def judge(ours: float, published: float, tolerance: float) -> tuple[Judgement, str]:
    """Judgement and its reason for two comparable numbers in the same unit.

    Args:
        published: as printed. Its number of decimals is its precision.
        tolerance: largest difference that is attributed to noise.
    """
    delta = ours - published
    digits = num_decimals(published)
    # 85.5 stands for 85.45 to 85.55: half a unit in the last printed digit. Both limits are inclusive.
    if abs(delta) <= 0.5 * 10.0**-digits + _ROUNDING:
        return "reproduced", f"equal to the published {published:.{digits}f}"
    if abs(delta) <= tolerance + _ROUNDING:
        return "within noise", f"differs by at most the tolerance of {tolerance:g}"
    # Not "better" or "worse": for parameters or a loss, less is better.
    side: Judgement = "above" if delta > 0 else "below"
    return side, f"differs by more than the tolerance of {tolerance:g}"


def num_decimals(value: float) -> int:
    """Decimals as printed: 85.5 -> 1, 79 -> 0."""
    # YAML keeps 53.0 (float) and 53 (int) apart, and repr of a float has its shortest exact digits.
    return len(repr(value).partition(".")[2]) if isinstance(value, float) and "e" not in repr(value) else 0


def verdict_of(
    expectation: Expectation,
    row: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    reasons: Sequence[Reason] = (),
    ledger: tuple[LedgerRow, ...] = (),
) -> Verdict:
    """Compare one expectation of a recipe with the measured metrics.

    Args:
        row: the published row that the expectation selects.
        metrics: metrics of the expectation's stage; None when it did not run.
        reasons: why this run's number must not be compared; empty where it may.
        ledger: how the number was measured, beside the published settings.
    """
    published, measured = row["value"], (metrics or {}).get(expectation.metric)
    ours = None if measured is None else measured * expectation.scale
    reason = ""
    if metrics is None:
        reason = f"stage {expectation.stage} did not run"
    elif ours is None:
        reason = f"stage {expectation.stage} did not measure {expectation.metric}"
    elif not math.isfinite(ours):
        reason = f"{expectation.metric} is not a finite number"
    # bool is a subclass of int in Python, and tables of settings hold `true` and `false`.
    elif isinstance(published, bool) or not isinstance(published, int | float):
        reason = "the published row is not a number"
    kinds: tuple[str, ...] = ("no result",) if reason else ()
    if not reason:
        reason = "; ".join(item.text for item in reasons)
        kinds = tuple(dict.fromkeys(item.kind for item in reasons))
    judgement: Judgement = "not comparable"
    delta = None
    if not reason and ours is not None:
        judgement, reason = judge(ours, published, expectation.tolerance)
        delta = ours - published
    return Verdict(
        expectation.stage, expectation.metric, ours, published, row["unit"], delta,
        expectation.tolerance, judgement, reason, row, ledger, kinds,
    )  # fmt: skip


@once_per_run
def verdicts_of(run: RunResults) -> list[Verdict]:
    """The verdict of every expectation of the run's recipe, in the recipe's order.

    Raises:
        RecipeError: when an expectation does not select exactly one published row.
    """
    recipe: Recipe = run.recipe
    return [
        verdict_of(
            item,
            find_row(recipe.source.paper, item.where),
            run.artifacts[item.stage].metrics if item.stage in run.artifacts else None,
            reasons_of(run, item, published_recipe(recipe, item)),
            ledger_of(item, run.artifacts.get(item.stage)),
        )
        for item in recipe.expect
    ]


def reasons_by_row(verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """(reason, `evaluate top1, detect box_AP`) of what is not comparable, each reason once."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.judgement == "not comparable":
            found.setdefault(verdict.reason, []).append(f"{verdict.stage} {verdict.metric}")
    return [(reason, ", ".join(metrics)) for reason, metrics in found.items()]


def counts_of(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """`num_expected`, `num_reproduced`, `num_within_noise`, ... as flat metrics."""
    counted = Counter(verdict.judgement for verdict in verdicts)
    # All judgements, also those that did not occur: a metric that is absent in some runs cannot be compared.
    named = {f"num_{name.replace(' ', '_')}": float(counted[name]) for name in JUDGEMENTS}
    return {"num_expected": float(len(verdicts)), **named}


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdict table as plain rows for CSV and MLflow; a missing number is an empty text."""
    return [
        {
            "stage": v.stage,
            "metric": v.metric,
            "published_as": v.title,
            "ours": "" if v.ours is None else round(v.ours, 4),
            "published": v.published,
            "unit": v.unit,
            "delta": "" if v.delta is None else round(v.delta, 4),
            "tolerance": v.tolerance,
            "verdict": v.judgement,
            "reason": v.reason,
            "setting": v.row["setting"],
            "source": v.row["source"],
        }
        for v in verdicts
    ]
