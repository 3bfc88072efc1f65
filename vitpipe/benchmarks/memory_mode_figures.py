"""Table, notes and figures of `vitpipe benchmark reversible`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.benchmarks.memory_modes import EXPLAINED, WAYS, ScaleErrors, StepCost
from vitpipe.models.memory_mode import safe_scale
from vitpipe.report.figures import Palette

TIME_BUDGET = 1.4
"""Reversible columns may take so many times the step time of plain autograd."""

_MARKERS = ("o", "s", "^", "D")
_SCALE_TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def step_rows(costs: Sequence[StepCost]) -> list[dict[str, str | int]]:
    """One row per way and number of columns, rounded for reading."""
    return [
        {
            "columns": cost.columns,
            "way": cost.way,
            "activations, MiB": f"{cost.activation_mib:.1f}",
            "with gradients": f"{cost.peak_mib:.1f}",
            "step, s": f"{cost.seconds:.3f}",
            "fastest, s": f"{cost.seconds_min:.3f}",
            "x plain": f"{cost.time_ratio:.2f}",
            "gradient error": f"{cost.gradient_error:.0e}" if cost.gradient_error else "0",
            "inverse error": "" if cost.inverse_error is None else f"{cost.inverse_error:.1e}",
            "training takes": cost.auto,
        }
        for cost in costs
    ]


def notes(costs: Sequence[StepCost]) -> list[str]:
    """What a reader of the table must know, a sentence each."""
    ways = "; ".join(f"{way}: {EXPLAINED[way]}" for way in WAYS)
    past = [cost for cost in costs if cost.way == "reversible" and cost.auto != "reversible"]
    return [
        f"Ways: {ways}.",
        "One half of the columns is bottom-up, the other top-down, so that 2 columns are 1 + 1.",
        "Activations: peak of all that is alive but parameters, their gradients and the input.",
        *(
            f"{cost.columns} columns are past what float32 can invert well: rebuilt states are off by "
            f"{cost.inverse_error:.1e}, gradients by {cost.gradient_error:.0e}. Training takes '{cost.auto}'."
            for cost in past
        ),
    ]


def draw_steps(costs: Sequence[StepCost], palette: Palette) -> Any:
    """Two panels over the number of columns: peak activation memory, and step time against plain autograd."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    memory, time = figure.subplots(1, 2)
    counts = sorted({cost.columns for cost in costs})
    for axes, title in ((memory, "peak of activations, MiB"), (time, "step time, plain autograd = 1")):
        _style(axes, title, "columns", palette)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
    for way, colour, marker in zip(WAYS, palette.series, _MARKERS, strict=False):
        of_way = {cost.columns: cost for cost in costs if cost.way == way}
        line = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.7, "label": way}
        memory.plot(counts, [of_way[count].activation_mib for count in counts], **line)
        time.plot(counts, [of_way[count].time_ratio for count in counts], **line)
    memory.set_ylim(bottom=0)
    time.set_ylim(0.9, max(1.6, *(1.05 * cost.time_ratio for cost in costs)))
    time.axhline(TIME_BUDGET, color=palette.muted, linewidth=1, linestyle="--")
    time.annotate(
        "budget", (1, TIME_BUDGET), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", fontsize=8, color=palette.muted,
    )  # fmt: skip
    memory.legend(fontsize=9, frameon=False, labelcolor=palette.muted)
    return figure


def draw_errors(errors: Sequence[ScaleErrors], palette: Palette) -> Any:
    """Errors of rebuilt states and of gradients over |scale|, and where the guard is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    _style(axes, "2 + 2 columns, float32", "|scale| of all columns", palette)
    axes.set(xscale="log", yscale="log")
    axes.invert_xaxis()
    axes.set_xticks(_SCALE_TICKS, [f"{tick:g}" for tick in _SCALE_TICKS])
    axes.set_xticks([], minor=True)
    scales = [error.scale for error in errors]
    lines = {
        "rebuilt states, largest error": [error.inverse_error for error in errors],
        "gradients, share of their norm": [error.gradient_error for error in errors],
    }
    for (label, values), colour, marker in zip(lines.items(), palette.series, _MARKERS, strict=False):
        axes.plot(scales, values, color=colour, marker=marker, markersize=4, linewidth=1.7, label=label)
    axes.plot(
        scales, [error.expected_error for error in errors], color=palette.muted, linewidth=1.2,
        linestyle="--", label="gradients, as the guard expects",
    )  # fmt: skip
    guard = safe_scale(2)
    axes.axvline(guard, color=palette.ink, linewidth=1, linestyle=":")
    axes.annotate(
        f"guard: below {guard:.2g} columns are kept", (guard, 1), xycoords=("data", "axes fraction"),
        xytext=(4, -9), textcoords="offset points", fontsize=8, color=palette.ink,
    )  # fmt: skip
    axes.legend(fontsize=8, frameon=False, labelcolor=palette.muted, loc="lower right")
    return figure


def _style(axes: Any, title: str, below: str, palette: Palette) -> None:
    axes.set_title(title, fontsize=9, color=palette.ink, loc="left")
    axes.set_xlabel(below, fontsize=8, color=palette.muted)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    axes.tick_params(which="both", colors=palette.muted, labelsize=9, length=0)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
