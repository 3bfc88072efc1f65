"""What several runs differ in: results, settings, times, data, code, machine; what is equal is left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from vitpipe.config.recorded import recorded_values
from vitpipe.config.telling_values import flat_values, value_text
from vitpipe.contracts.units import format_duration
from vitpipe.report.result_tables import ShownTable, by_interest, is_percent, metric_label, show, told_apart
from vitpipe.report.results import TOTAL_TIME, RunResults, stages_by_interest
from vitpipe.report.run_labels import are_seeds_of_one, labels, repetitions

_ABSENT = "—"
_DIGEST_DIGITS = 12


def difference_tables(runs: Sequence[RunResults]) -> list[ShownTable]:
    """Tables of what differs, a column per run: results, settings, times, origin; empty ones are left out."""
    if len(runs) < 2:
        return []
    found = [results_side_by_side(runs), _settings(runs), _times(runs), _origin(runs)]
    return [table for table in found if table is not None and table.rows]


def results_side_by_side(runs: Sequence[RunResults]) -> ShownTable | None:
    """Final metrics that differ, one column per run; with a mean where a stage is one recipe's over seeds.

    The rows of a stage and of a metric stand together; numbers have the digits that it takes to differ.
    """
    if len(runs) < 2:
        return None
    rows: list[tuple[str, ...]] = []
    equal = 0
    averaged: dict[str, None] = {}  # ordered sets
    others: dict[str, None] = {}
    stages = stages_by_interest(runs)
    over_seeds = {stage: are_seeds_of_one(runs, stage) for stage in stages}
    has_means = any(over_seeds.values())
    for stage in stages:
        per_run = [run.artifacts[stage].metrics if stage in run.artifacts else {} for run in runs]
        for name in by_interest(stage, dict.fromkeys(key for metrics in per_run for key in metrics)):
            values = [metrics.get(name) for metrics in per_run]
            if len({repr(value) for value in values}) == 1:
                equal += 1
                continue
            cells = _cells(name, values)
            if has_means:
                known = [v for v in values if v is not None]
                cells.append(_mean_and_spread(name, known) if over_seeds[stage] else _ABSENT)
            (averaged if over_seeds[stage] else others)[stage] = None
            rows.append((f"{stage} {metric_label(name)}", *cells))
    heads = ("result", *labels(runs), *(("mean ± sd",) if has_means else ()))
    title = "Results" + (f": {equal} more are the same in all runs" if equal else "")
    note = _note(runs, list(averaged), list(others))
    numeric = (False, *(True,) * (len(heads) - 1))
    return ShownTable("side_by_side", title, heads, numeric, tuple(rows), note=note)


def _cells(name: str, values: Sequence[float | None]) -> list[str]:
    texts = iter(told_apart([v for v in values if v is not None], partial(show, name)))
    return [_ABSENT if value is None else next(texts) for value in values]


def _note(runs: Sequence[RunResults], averaged: Sequence[str], others: Sequence[str]) -> str:
    """Over what the means are, and why stages have none."""
    said = []
    if averaged:
        seeds = ", ".join(str(run.recipe.seed) for run in runs)
        where = f" of {', '.join(averaged)}" if others else ""
        said.append(
            f"Mean and sample standard deviation{where}: over the seeds {seeds} of one recipe, all other "
            "values that act on the stage, and its data, being equal."
        )
    if others and len({(run.recipe.name, run.recipe.profile) for run in runs}) == 1:
        said += [
            f"{', '.join(names)}: one recipe and one seed, run {len(names)} times. That is a repetition, not "
            "another seed, so it has no mean; what differs comes from data, code or machine."
            for names in repetitions(runs)
        ]
        if not said or averaged:
            where = f" of {', '.join(others)}" if averaged else ""
            said.append(f"No mean{where}: the runs differ in more than the seed.")
    return " ".join(said)


def _settings(runs: Sequence[RunResults]) -> ShownTable:
    values = [flat_values(recorded_values(run.recipe)) for run in runs]
    return _table("settings", "Settings", "key of the recipe", runs, values, value_text)


def _times(runs: Sequence[RunResults]) -> ShownTable:
    rows = [
        {**run.stage_seconds(), **({TOTAL_TIME: run.total_seconds} if run.total_seconds else {})}
        for run in runs
    ]
    return _table("times", "Time", "stage", runs, rows, format_duration, is_measured=True)


def _origin(runs: Sequence[RunResults]) -> ShownTable:
    """Data, code, libraries and machine, as far as all stages of a run agree on them."""
    rows = []
    for run in runs:
        found: dict[str, set[str]] = {}
        for _, artifact in run.stages():
            record = artifact.run
            commit, plus, changes = record.git_commit.partition("+")
            facts = {
                "data": artifact.card.data_digest[:_DIGEST_DIGITS],
                "git commit": commit[:_DIGEST_DIGITS] + plus + changes,
            }
            for name, value in {**facts, **record.hardware, **artifact.libraries}.items():
                found.setdefault(metric_label(name), set()).add(str(value))
        rows.append({name: ", ".join(sorted(values)) for name, values in found.items()})
    return _table("origin", "Data, code and machine", "", runs, rows, str)


def _table(
    name: str,
    title: str,
    first: str,
    runs: Sequence[RunResults],
    values: Sequence[Mapping[str, Any]],
    shown: Callable[[Any], str],
    *,
    is_measured: bool = False,
) -> ShownTable:
    """The keys whose values differ between runs.

    Args:
        is_measured: numbers that nobody has set; those that look the same are left out.
    """
    keys = dict.fromkeys(key for own in values for key in own)
    differing = [key for key in keys if len({value_text(own.get(key, _ABSENT)) for own in values}) > 1]
    rows = [(key, *(shown(own[key]) if key in own else _ABSENT for own in values)) for key in differing]
    if is_measured:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return ShownTable(name, title, (first, *labels(runs)), (False, *(is_measured,) * len(runs)), tuple(rows))


def _mean_and_spread(name: str, values: Sequence[float]) -> str:
    if len(values) < 2:
        return _ABSENT
    # stdev divides by n - 1: the seeds are a sample of all seeds.
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if is_percent(name):
        # A spread that is not zero does not look like zero.
        digits = max(1, -math.floor(math.log10(100 * spread))) if spread else 1
        return f"{100 * mean:.{digits}f} ± {100 * spread:.{digits}f} %"
    return f"{mean:.4g} ± {spread:.2g}"
