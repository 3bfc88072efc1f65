"""Tables and figure of `vitpipe benchmark data`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.benchmarks.data_path import PathSpeed, Setting, StepShare
from vitpipe.contracts.units import counted
from vitpipe.report.figures import Palette


def describe(setting: Setting, mean_bytes: float) -> str:
    """Images and settings in one line.

    Args:
        mean_bytes: mean size of the JPEGs.
    """
    images = setting.photographs
    return (
        f"{images.number} JPEGs of {images.width} x {images.height}, {mean_bytes / 1000:.0f} kB on average, "
        f"to {setting.image_size} pixels in batches of {setting.batch}; one core, median of "
        f"{counted(setting.num_rounds, 'alternating round')}"
    )


def path_rows(speeds: Sequence[PathSpeed]) -> list[dict[str, str]]:
    """One row per path, rounded for display."""
    return [
        {
            "path": speed.path,
            "ImageFolder, images/s": f"{speed.folder_images_per_second:,.0f}",
            "shards, images/s": f"{speed.shards_images_per_second:,.0f}",
            "speed-up": f"{speed.ratio:.2f}",
            "pixels": f"identical, {counted(speed.num_compared, 'image')}"
            if speed.num_different == 0
            else f"{speed.num_different} of {speed.num_compared} images differ",
        }
        for speed in speeds
    ]


def share_rows(shares: Sequence[StepShare]) -> list[dict[str, str]]:
    """One row per transform and a total: milliseconds per image and share of the total, on both sides."""
    folder, shards = sum(share.folder_ms for share in shares), sum(share.shards_ms for share in shares)
    rows = [(share.step, share.folder_ms, share.shards_ms) for share in shares]
    return [
        {
            "step": step,
            "ImageFolder, ms": f"{folder_ms:.3f}",
            "ImageFolder, share": f"{folder_ms / folder:.0%}",
            "shards, ms": f"{shards_ms:.3f}",
            "shards, share": f"{shards_ms / shards:.0%}",
        }
        for step, folder_ms, shards_ms in [*rows, ("total", folder, shards)]
    ]


def draw(speeds: Sequence[PathSpeed], shares: Sequence[StepShare], palette: Palette) -> Any:
    """Two panels: images/s of every path on both sides, and milliseconds per image of fine-tuning by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_speeds(left, speeds, palette)
    _draw_shares(right, shares, palette)
    for axes in (left, right):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(palette.grid)
        axes.tick_params(which="both", colors=palette.muted, labelsize=9, length=0)
        axes.grid(axis="x", color=palette.grid, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _draw_speeds(axes: Any, speeds: Sequence[PathSpeed], palette: Palette) -> None:
    axes.set_title("images per second on one core", fontsize=9, color=palette.ink, loc="left")
    rows = range(len(speeds))
    folder = [speed.folder_images_per_second for speed in speeds]
    shards = [speed.shards_images_per_second for speed in speeds]
    axes.barh([row - 0.19 for row in rows], shards, 0.36, color=palette.series[0], label="vitpipe shards")
    axes.barh([row + 0.19 for row in rows], folder, 0.36, color=palette.muted, label="ImageFolder")
    for row, speed in zip(rows, speeds, strict=True):
        axes.annotate(
            f"{speed.ratio:.2f} x", (speed.shards_images_per_second, row - 0.19), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color=palette.ink,
        )  # fmt: skip
    axes.set_yticks(list(rows), [speed.path for speed in speeds])
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(shards))
    axes.legend(
        fontsize=8, frameon=False, labelcolor=palette.muted, ncols=2, loc="upper center",
        bbox_to_anchor=(0.45, -0.12),
    )  # fmt: skip


def _draw_shares(axes: Any, shares: Sequence[StepShare], palette: Palette) -> None:
    axes.set_title("fine-tuning, ms per image", fontsize=9, color=palette.ink, loc="left")
    sides = ("ImageFolder", "vitpipe shards")
    start = [0.0, 0.0]
    # Not strict: the palette has as many colours as fine-tuning has steps today, but may have more.
    for share, colour in zip(shares, palette.series, strict=False):
        widths = [share.folder_ms, share.shards_ms]
        axes.barh(sides, widths, 0.5, left=start, color=colour, label=share.step)
        start = [begin + width for begin, width in zip(start, widths, strict=True)]
    axes.legend(
        fontsize=8, frameon=False, labelcolor=palette.muted, ncols=2, loc="upper center",
        bbox_to_anchor=(0.45, -0.12),
    )  # fmt: skip
