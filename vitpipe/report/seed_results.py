"""A published row beside our results over several seeds: mean, sample standard deviation, verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitpipe.config.recipe import Expectation
from vitpipe.report.comparability import Reason
from vitpipe.report.compare import Verdict, num_decimals, verdict_of
from vitpipe.report.result_tables import in_unit, told_apart


@dataclass(frozen=True)
class SeedResults:
    """One published row and what one recipe gives for it.

    Attributes:
        recipe: its name; empty when none claims the row.
        values: seed -> our number in the row's unit, of the seeds that are finished.
        verdict: of the mean; None when no recipe claims the row.
        reason: the verdict's, or why there is no number.
    """

    row: Mapping[str, Any]
    recipe: str
    stage: str
    values: Mapping[int, float]
    verdict: Verdict | None
    reason: str

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, in the row's unit; None without a result."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation (n - 1) over the seeds, in the row's unit; None for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def ours(self) -> str:
        """`67.31 ± 0.42 %`, `89.1 M`; an em dash without a result."""
        unit, mean, spread = str(self.row["unit"]), self.mean, self.spread
        # A count, such as the parameters, is the same at every seed; an accuracy that is, is worth a look.
        if mean is None or spread is None or (spread == 0 and unit != "percent"):
            return in_unit(mean, unit)
        # The spread with as many decimals as the mean is shown with, at least those of the published number.
        digits = max(2, num_decimals(self.row["value"])) if abs(mean) < 1000 else 0
        return f"{mean:,.{digits}f} ± {in_unit(spread, unit, digits)}"

    @property
    def by_seed(self) -> str:
        """`seed 0: 67.2, seed 1: 67.5` where the seeds differ, else empty."""
        unit = str(self.row["unit"])
        numbers = told_apart(
            list(self.values.values()),
            lambda value, extra: in_unit(value, unit, 2 + extra if extra else None),
        )
        texts = [f"seed {seed}: {text}" for seed, text in zip(self.values, numbers, strict=True)]
        return ", ".join(texts) if self.spread else ""

    @property
    def published(self) -> str:
        """The row's number as printed, with its unit."""
        value = self.row["value"]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return in_unit(value, str(self.row["unit"]), num_decimals(value)) if is_number else str(value)

    @property
    def judgement(self) -> str:
        """The verdict in words; `no recipe` for a row that none claims."""
        return self.verdict.judgement if self.verdict else "no recipe"


def without_recipe(row: Mapping[str, Any]) -> SeedResults:
    """A row that no recipe claims."""
    return SeedResults(row, "", "", {}, None, "no recipe claims this row")


def results_over_seeds(
    row: Mapping[str, Any],
    recipe: str,
    expectation: Expectation,
    metrics: Mapping[int, Mapping[str, float]],
    *,
    reasons: Sequence[Reason],
    missing: str,
) -> SeedResults:
    """Compare the mean over the finished seeds with a published row.

    Args:
        metrics: seed -> metrics of the expectation's stage, of the seeds that are finished.
        reasons: why these results must not be compared; empty where they may.
        missing: why seeds are missing; empty if none is.
    """
    ours = {
        seed: values[expectation.metric] * expectation.scale
        for seed, values in metrics.items()
        if expectation.metric in values and math.isfinite(values[expectation.metric])
    }
    # verdict_of scales by itself; without any finished seed it says that the stage did not run.
    measured: dict[str, float] | None = None
    if metrics:
        measured = {}
        if ours:
            measured[expectation.metric] = statistics.fmean(ours.values()) / expectation.scale
    verdict = verdict_of(expectation, row, measured, reasons)
    why = [missing] if missing else []
    # "did not run" says less than why it did not.
    if metrics or not missing:
        why.append(verdict.reason)
    return SeedResults(row, recipe, expectation.stage, ours, verdict, "; ".join(why))


def plain_rows(results: Sequence[SeedResults]) -> list[dict[str, Any]]:
    """The table as plain rows for CSV, JSON and MLflow; a missing number is an empty text."""
    return [
        {
            "method": item.row["method"],
            "variant": item.row["variant"],
            "dataset": item.row["dataset"],
            "metric": item.row["metric"],
            "published": item.row["value"],
            "unit": item.row["unit"],
            "ours_mean": _rounded(item.mean),
            "ours_sd": _rounded(item.spread),
            "num_seeds": len(item.values),
            "delta": _rounded(item.verdict.delta if item.verdict else None),
            "tolerance": item.verdict.tolerance if item.verdict else "",
            "verdict": item.judgement,
            "reason": item.reason,
            "recipe": item.recipe,
            "stage": item.stage,
            "seeds": " ".join(f"{seed}:{value:.6g}" for seed, value in item.values.items()),
            "setting": item.row["setting"],
            "source": item.row["source"],
        }
        for item in results
    ]


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)
