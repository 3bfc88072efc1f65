"""Table, notes and figures of `vitpipe benchmark reversible`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.benchmarks.memory_modes import EXPLAINED, MODES, ScaleErrors, StepCost
from vitpipe.models.memory_mode import safe_scale
from vitpipe.report.figures import Palette

# The project's limit for the step time of reversible columns relative to plain autograd. One recomputed
# forward pass alone makes 4/3, as a backward pass costs about two forward passes.
TIME_BUDGET = 1.4
_MARKERS = ("o", "s", "^", "D")
_SCALE_TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def step_rows(costs: Sequence[StepCost]) -> list[dict[str, str | int]]:
    """One row per memory mode and number of columns, rounded for display."""
    return [
        {
            "columns": cost.columns,
            "mode": cost.way,
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
    """Explanations of the table, one sentence each."""
    modes = "; ".join(f"{way}: {EXPLAINED[way]}" for way in MODES)
    # Measured in spite of the guard, for their memory and time: the reader must not take it for advice.
    past = [cost for cost in costs if cost.way == "reversible" and cost.auto != "reversible"]
    return [
        f"Modes: {modes}.",
        "Half of the columns are bottom-up, half top-down: 2 columns are 1 + 1.",
        "Activations: peak of live tensors without parameters, their gradients and the input.",
        *(
            f"{cost.columns} columns exceed what float32 can invert accurately: the error is "
            f"{cost.inverse_error:.1e} in rebuilt states and {cost.gradient_error:.0e} in gradients. "
            f"Training uses '{cost.auto}'."
            for cost in past
        ),
    ]


def draw_steps(costs: Sequence[StepCost], palette: Palette) -> Any:
    """Two panels over the number of columns: peak activation memory, and step time over plain autograd's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    memory, time = figure.subplots(1, 2)
    counts = sorted({cost.columns for cost in costs})
    for axes, title in (
        (memory, "peak activation memory, MiB"),
        (time, "step time relative to plain autograd"),
    ):
        _style(axes, title, "columns", palette)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
    for way, colour, marker in zip(MODES, palette.series, _MARKERS, strict=False):
        of_way = {cost.columns: cost for cost in costs if cost.way == way}
        line = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.7, "label": way}
        memory.plot(counts, [of_way[count].activation_mib for count in counts], **line)
        time.plot(counts, [of_way[count].time_ratio for count in counts], **line)
    # From 0, because the claim is that reversible memory is constant; times differ by less than half.
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
    """Errors of rebuilt states and of gradients over |scale|, and the guard's limit for inversion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    _style(axes, "2 + 2 columns, float32", "|scale| of all columns", palette)
    axes.set(xscale="log", yscale="log")
    axes.invert_xaxis()  # errors grow to the right
    axes.set_xticks(_SCALE_TICKS, [f"{tick:g}" for tick in _SCALE_TICKS])
    axes.set_xticks([], minor=True)
    scales = [error.scale for error in errors]
    lines = {
        "rebuilt states, largest absolute error": [error.inverse_error for error in errors],
        "gradients, error relative to their norm": [error.gradient_error for error in errors],
    }
    for (label, values), colour, marker in zip(lines.items(), palette.series, _MARKERS, strict=False):
        axes.plot(scales, values, color=colour, marker=marker, markersize=4, linewidth=1.7, label=label)
    axes.plot(
        scales, [error.expected_error for error in errors], color=palette.muted, linewidth=1.2,
        linestyle="--", label="gradients, predicted by the guard",
    )  # fmt: skip
    guard = safe_scale(2)  # of 2 + 2 columns the top-down chain inverts two
    axes.axvline(guard, color=palette.ink, linewidth=1, linestyle=":")
    axes.annotate(
        f"guard: no inversion below {guard:.2g}", (guard, 1), xycoords=("data", "axes fraction"),
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
