"""What several runs differ in: results, settings, times, data, code, machine; what is equal is left out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitpipe.contracts.units import format_duration
from vitpipe.report.recipe_differences import flat_values
from vitpipe.report.reference import recorded_values
from vitpipe.report.result_tables import ShownTable, by_interest, is_percent, metric_label, show
from vitpipe.report.results import RunResults, labels, stages_by_interest

_ABSENT = "—"
_DIGEST_DIGITS = 12


def difference_tables(runs: Sequence[RunResults]) -> list[ShownTable]:
    """Tables of what differs, a column per run: results, settings, times, origin; empty ones are left out."""
    if len(runs) < 2:
        return []
    found = [results_side_by_side(runs), _settings(runs), _times(runs), _origin(runs)]
    return [table for table in found if table is not None and table.rows]


def results_side_by_side(runs: Sequence[RunResults]) -> ShownTable | None:
    """Final metrics that differ, one column per run; with mean and standard deviation over seeds."""
    if len(runs) < 2:
        return None
    rows: list[tuple[str, ...]] = []
    equal = 0
    # Runs of one recipe and profile differ in the seed or in an override.
    is_repetition = len({(run.recipe.name, run.recipe.profile) for run in runs}) == 1
    for stage in stages_by_interest(runs):
        per_run = [run.artifacts[stage].metrics if stage in run.artifacts else {} for run in runs]
        for name in by_interest(stage, dict.fromkeys(key for metrics in per_run for key in metrics)):
            values = [metrics.get(name) for metrics in per_run]
            if len(set(values)) == 1:
                equal += 1
                continue
            cells = [show(name, v) if v is not None else _ABSENT for v in values]
            if is_repetition:
                cells.append(_mean_and_spread(name, [v for v in values if v is not None]))
            rows.append((f"{stage} {metric_label(name)}", *cells))
    heads = ("result", *labels(runs), *(("mean ± sd",) if is_repetition else ()))
    title = "Results" + (f": {equal} more are the same in all runs" if equal else "")
    return ShownTable("side_by_side", title, heads, (False, *(True,) * (len(heads) - 1)), tuple(rows))


def _settings(runs: Sequence[RunResults]) -> ShownTable:
    values = [flat_values(recorded_values(run.recipe)) for run in runs]
    return _table("settings", "Settings", "key of the recipe", runs, values, _plain)


def _times(runs: Sequence[RunResults]) -> ShownTable:
    seconds = [run.known_seconds() for run in runs]
    totals = [{"all stages": run.wall_seconds} if run.wall_seconds else {} for run in runs]
    rows = [{**own, **total} for own, total in zip(seconds, totals, strict=True)]
    return _table("times", "Time", "stage", runs, rows, format_duration, is_number=True)


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
    is_number: bool = False,
) -> ShownTable:
    """The keys whose values differ between runs."""
    keys = dict.fromkeys(key for own in values for key in own)
    differing = [key for key in keys if len({_plain(own.get(key, _ABSENT)) for own in values}) > 1]
    rows = tuple((key, *(shown(own[key]) if key in own else _ABSENT for own in values)) for key in differing)
    return ShownTable(name, title, (first, *labels(runs)), (False, *(is_number,) * len(runs)), rows)


def _plain(value: Any) -> str:
    is_whole = isinstance(value, float) and value.is_integer()
    return value if isinstance(value, str) else json.dumps(int(value) if is_whole else value)


def _mean_and_spread(name: str, values: Sequence[float]) -> str:
    if len(values) < 2:
        return _ABSENT
    # stdev divides by n - 1: the seeds are a sample of all seeds.
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if is_percent(name):
        return f"{100 * mean:.1f} ± {100 * spread:.1f} %"
    return f"{mean:.4g} ± {spread:.2g}"
