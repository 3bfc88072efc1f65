"""The comparison with recorded results as plain rows, as a formatted table and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vitpipe.papers.recorded_results import Reference
from vitpipe.report.reference import ReferenceComparison, ReferenceVerdict
from vitpipe.report.result_tables import (
    MILLIONS,
    ShownTable,
    decimals_of_millions,
    in_unit,
    markdown,
    markdown_text,
    metric_label,
)

COLUMNS = ("metric", "ours", "mean", "sd", "range", "difference", "verdict")
NUMERIC = (False, True, True, True, True, True, False)
_COMMIT_DIGITS = 12
_CHANGES = "+changes"


def reference_rows(comparisons: Sequence[ReferenceComparison | None]) -> list[dict[str, Any]]:
    """The comparison as plain rows for CSV, JSON and MLflow; a missing number is an empty text."""
    return [
        {
            "recipe": found.recipe,
            "stage": item.stage,
            "metric": item.metric,
            "ours": round(item.ours, 6) if item.ours is not None and math.isfinite(item.ours) else "",
            "unit": item.unit,
            "reference_mean": item.row.mean if item.row else "",
            "reference_sd": item.row.spread if item.row else "",
            "reference_min": item.row.minimum if item.row else "",
            "reference_max": item.row.maximum if item.row else "",
            "num_seeds": len(found.reference.seeds) if found.reference else 0,
            "delta": "" if item.delta is None else round(item.delta, 6),
            "verdict": item.judgement,
            "reason": item.reason,
        }
        for found in comparisons
        if found is not None
        for item in found.verdicts
    ]


def reference_cells(item: ReferenceVerdict) -> tuple[str, ...]:
    """One row of the table as texts, see `COLUMNS`; all numbers with the decimals of the recorded ones."""
    row = item.row
    digits = _decimals(item)
    ours = in_unit(item.ours, item.unit, digits)
    label = f"{item.stage} {metric_label(item.metric)}"
    if row is None:
        return (label, ours, "—", "—", "—", "—", item.judgement)
    low, high = (f"{value:,.{digits}f}" for value in (row.minimum, row.maximum))
    return (
        label,
        ours,
        in_unit(row.mean, item.unit, digits),
        in_unit(row.spread, "", digits),
        low if low == high else f"{low} to {high}",
        "—" if item.delta is None else f"{item.delta:+z,.{digits}f}".replace("-", "−"),
        item.judgement,
    )


def _decimals(item: ReferenceVerdict) -> int | None:
    """Those of the recorded numbers; parameters as everywhere, unless that would hide a difference."""
    if item.row is None:
        return None
    if item.unit == MILLIONS:
        digits = decimals_of_millions(item.row.mean)
        if not item.delta or round(item.delta, digits) or not round(item.delta, item.row.decimals):
            return digits
    return item.row.decimals


def provenance(reference: Reference) -> str:
    """Seeds, processor, commit and day of recorded results as one line."""
    seeds = f"seeds {', '.join(map(str, reference.seeds))}"
    commits = ", ".join(
        text.removesuffix(_CHANGES)[:_COMMIT_DIGITS] + (" with changes" if text.endswith(_CHANGES) else "")
        for text in reference.commits
    )
    return f"{seeds}; {', '.join(reference.processors)}; commit {commits}; {reference.measured_on}"


def notes_of(comparison: ReferenceComparison | None) -> list[str]:
    """What stands below the table: that there is no reference, or why stages are not comparable."""
    if comparison is None:
        return []
    if comparison.missing:
        return [f"{comparison.recipe}: {comparison.missing}"]
    return [f"Not comparable ({', '.join(stages)}): {reason}." for reason, stages in comparison.reasons()]


def reference_markdown(comparison: ReferenceComparison) -> str:
    """The comparison in Markdown: a table with its notes, or that there is no reference."""
    notes = notes_of(comparison)
    if comparison.reference is None:
        return "\n\n".join(notes)
    rows = tuple(
        (*cells[:-1], f"**{item.judgement}**: {markdown_text(item.reason)}")
        for item in comparison.verdicts
        for cells in (reference_cells(item),)
    )
    head = f"Reference of {comparison.recipe}: {provenance(comparison.reference)}."
    return f"{head}\n\n{markdown(ShownTable('reference', '', COLUMNS, NUMERIC, rows), has_markup=True)}"
