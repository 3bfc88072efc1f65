"""Figures by matplotlib: learning curves, confusion matrix, time per stage.

Each figure is drawn in one of two palettes: `PAPER` for PNG files, `THEMED` for SVG inside the page, whose
colours follow the light or dark theme of the browser.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.report.result_tables import is_percent, metric_label
from vitpipe.report.results import Curve

# A panel of the page is about 330 pixels wide. Half a million steps would look the same at a thousand times
# the size.
MAX_POINTS = 400
MAX_CLASSES = 30  # the figure has at most 8 inches, which leaves a quarter of an inch per class
NUM_SERIES = 6
_PARTS = "loss components"

# In the PNG, so that a figure of ours can be told from a file of the user's and be replaced.
_SOFTWARE = "vitpipe"


@dataclass(frozen=True)
class Palette:
    """Colours of a figure as hex texts; the `series` are distinguishable for colour-blind readers.

    Attributes:
        on_series: of text on an area in a colour of the series.
    """

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    on_series: str


# After Okabe and Ito (2008), "Color Universal Design", with the yellow darkened for a white background.
PAPER = Palette(
    "#1c2430",
    "#5b6675",
    "#e3e7ec",
    ("#2563c9", "#d2601a", "#0b8f6a", "#b0478f", "#8a6d00", "#4c8fb8"),
    "#ffffff",
)
# Placeholders: `inline_svg` replaces these near-blacks, which no figure uses otherwise, by CSS variables of
# the page. matplotlib accepts only colours that it can parse, so the variables cannot be given to it.
THEMED = Palette(
    "#010101", "#020202", "#030303", tuple(f"#0405{i:02x}" for i in range(NUM_SERIES)), "#060606"
)
_VARIABLES = {
    THEMED.ink: "var(--ink)",
    THEMED.muted: "var(--muted)",
    THEMED.grid: "var(--line)",
    THEMED.on_series: "var(--on-series)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(THEMED.series)},
}


@dataclass(frozen=True)
class Panel:
    """Curves that share one pair of axes: `lines` maps legend text -> curve."""

    stage: str
    title: str
    lines: Mapping[str, Curve]

    @property
    def is_aside(self) -> bool:
        """Throughput, memory and other diagnostics, which the page shows collapsed."""
        names = ("learning_rate", "images_per_second", "memory_gib", "loss_scale", "grad_norm")
        return any(name in self.title for name in names) or self.title == _PARTS


def panels(curves: Mapping[str, Sequence[Curve]]) -> list[Panel]:
    """Group the curves of one stage: training and validation, components of a loss, and runs share axes.

    Args:
        curves: run label -> curves of this stage.
    """
    grouped: dict[str, dict[str, Curve]] = {}
    for label, of_run in curves.items():
        for curve in of_run:
            split, _, last = curve.name.rpartition("/")
            # mmdet and mmseg name components `loss_cls`, `loss_rpn_bbox`, `decode.loss_ce`; loss_scale is the
            # gradient scaler's.
            is_part = "loss" in last and last not in ("loss", "loss_scale")
            title = _PARTS if is_part else last
            inside = last if is_part else split
            legend = " · ".join(filter(None, (label if len(curves) > 1 else "", inside)))
            grouped.setdefault(title, {})[legend] = curve
    stage = next((c.stage for of_run in curves.values() for c in of_run), "")
    found = [Panel(stage, title, lines) for title, lines in grouped.items()]
    return sorted(found, key=lambda panel: (panel.is_aside, panel.title != "loss", panel.title))


def draw_panel(panel: Panel, palette: Palette) -> Any:
    """One pair of axes with a line per curve, and a legend if there are several."""
    figure, axes = _axes(4.6, 2.7, palette)
    _draw_lines(axes, panel, palette)
    return figure


def draw_stage_curves(stage_panels: Sequence[Panel], palette: Palette) -> Any:
    """All main panels of a stage in one row, for the Markdown report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(stage_panels), 2.9), layout="constrained")
    grid = figure.subplots(1, len(stage_panels), squeeze=False)[0]
    for axes, panel in zip(grid, stage_panels, strict=True):
        _style(axes, palette)
        axes.set_title(
            _plain(f"{panel.stage}: {metric_label(panel.title)}"), fontsize=9, color=palette.ink, loc="left"
        )
        _draw_lines(axes, panel, palette)
    return figure


def draw_confusion(
    rows: Sequence[Mapping[str, str]], palette: Palette, class_names: Mapping[str, str] | None = None
) -> Any | None:
    """Confusion matrix: true class (rows) against predicted class (columns); None beyond `MAX_CLASSES`.

    The colour is the share of the true class, the number in a cell its count of images.

    Args:
        rows: the table `confusion`: true, predicted, images.
        class_names: class key -> readable name.
    """
    counts = {(row["true"], row["predicted"]): int(row["images"]) for row in rows}
    names = sorted({name for pair in counts for name in pair}, key=_natural)
    if not names or len(names) > MAX_CLASSES:
        return None
    from matplotlib.patches import Rectangle

    totals = {true: sum(n for (t, _), n in counts.items() if t == true) for true in names}
    side = min(8.0, 1.4 + 0.38 * len(names))
    figure, axes = _axes(side, side, palette, grid=False)
    # Rectangles instead of imshow: an image inside an SVG could not follow the theme's colours.
    for (true, predicted), count in counts.items():
        share = count / totals[true]
        x, y = names.index(predicted), names.index(true)
        colour = palette.series[0 if true == predicted else 1]  # correct and wrong predictions
        # From 0.08, so that a single wrong image of many is still visible.
        alpha = 0.08 + 0.87 * share
        axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, alpha=alpha, lw=0))
        if len(names) <= 15:
            # The cell's colour is the series at `alpha` over the page.
            strong = palette.on_series if share > 0.75 else palette.ink
            axes.text(x, y, str(count), ha="center", va="center", fontsize=7.5, color=strong)
    texts = [_plain((class_names or {}).get(name, name)) for name in names]
    axes.set_xticks(range(len(names)), texts, rotation=90 if max(map(len, texts)) > 3 else 0)
    axes.set_yticks(range(len(names)), texts)
    # The y axis points down, so that correct predictions are on the diagonal from the top left.
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xlabel("predicted", color=palette.muted, fontsize=8)
    axes.set_ylabel("true", color=palette.muted, fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def draw_times(seconds: Mapping[str, float], texts: Mapping[str, str], palette: Palette) -> Any:
    """A bar per stage, its time written at the end.

    Args:
        seconds: stage -> wall time.
        texts: stage -> the formatted time.
    """
    names = list(seconds)
    figure, axes = _axes(6.4, 0.45 + 0.3 * len(names), palette, grid=False)
    bars = axes.barh(
        [_plain(name) for name in names], list(seconds.values()), height=0.58, color=palette.series[0]
    )
    axes.bar_label(bars, [texts[name] for name in names], padding=5, fontsize=8.5, color=palette.ink)
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds.values(), default=1.0) * 1.22)  # room for the label of the longest bar
    axes.spines[["bottom"]].set_visible(False)
    axes.tick_params(length=0, axis="y", labelsize=9, colors=palette.ink)
    axes.set_xticks([])
    return figure


def save_png(figure: Any, path: Path) -> Path:
    """Write a figure on a white background, 160 dots per inch, marked as ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": _SOFTWARE})
    return path


def is_own_png(path: Path) -> bool:
    """Whether a file is a figure that `save_png` has written."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return bool(picture.info.get("Software") == _SOFTWARE)
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for files that are no images
        return False


def inline_svg(figure: Any, label: str, key: str = "") -> str:
    """A figure in the palette `THEMED` as an SVG element that takes its colours and font from the page.

    Args:
        label: description for screen readers.
        key: prefix of the element ids, unique on the page; default: the label.
    """
    import matplotlib

    buffer = io.StringIO()
    salt = re.sub(r"\W+", "-", key or label)
    # fonttype none keeps text as text, in the font of the page; the default draws it as paths. Without a
    # hashsalt, matplotlib derives ids from a random UUID, and without Date=None it writes the time: the same
    # inputs must give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # an XML declaration is not allowed inside HTML
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    # width and height are dropped, so that the figure scales with the page.
    view = re.search(r'viewBox="([^"]+)"', text)
    head = f'<svg viewBox="{view[1] if view else "0 0 1 1"}" role="img" aria-label="{_attribute(label)}"'
    text = re.sub(r"<svg[^>]*", head + ' xmlns:xlink="http://www.w3.org/1999/xlink"', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # All SVG elements of a page share its ids: without a prefix, a clip path of one figure would apply to
    # others.
    text = re.sub(r' id="([^"]+)"', rf' id="{salt}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{salt}-", text)
    # matplotlib writes `font: 9px DejaVu Sans`; only the size is kept.
    return re.sub(r"font: ?[^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", text)


def _axes(width: float, height: float, palette: Palette, *, grid: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure open and loads a GUI backend

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style(axes, palette, grid=grid)
    return figure, axes


def _style(axes: Any, palette: Palette, *, grid: bool = True) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    axes.tick_params(colors=palette.muted, labelsize=9, length=0, pad=4)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0.0)
    if grid:
        axes.grid(axis="y", color=palette.grid, linewidth=0.8)


def _draw_lines(axes: Any, panel: Panel, palette: Palette) -> None:
    for i, (legend, curve) in enumerate(panel.lines.items()):
        steps, values = _thinned(curve)
        axes.plot(
            steps, values, label=_plain(legend), linewidth=1.7, color=palette.series[i % NUM_SERIES],
            linestyle=("-", "--", ":")[(i // NUM_SERIES) % 3], solid_capstyle="round",
        )  # fmt: skip
    axes.margins(x=0.01)
    axes.locator_params(axis="both", nbins=5)
    axes.set_xlabel("optimiser step", color=palette.muted, fontsize=8)
    every = [v for curve in panel.lines.values() for v in curve.values]
    if is_percent(panel.title):
        from matplotlib.ticker import PercentFormatter

        # Logged as ratios, shown in percent like everywhere in the report.
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    elif "learning_rate" in panel.title:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.yaxis.get_offset_text().set(fontsize=8, color=palette.muted)
    # A curve that falls by more than a factor of 50 is flat on a linear axis for most of its length.
    elif every and min(every) > 0 and max(every) > 50 * min(every):
        axes.set_yscale("log")
    if len(panel.lines) > 1:
        columns = 2 if len(panel.lines) > 4 else 1
        axes.legend(fontsize=9, frameon=False, labelcolor=palette.muted, ncols=columns, handlelength=1.4)


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is.

    Between two dollars it would read a formula, and end the drawing where it cannot; a legend leaves out what
    starts with an underscore; a font has no picture for control characters.
    """
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _thinned(curve: Curve) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Every n-th point and the last one."""
    # Logged points, not averages, which would hide spikes of the loss.
    every = -(-len(curve.steps) // MAX_POINTS)
    keep = sorted({*range(0, len(curve.steps), every), len(curve.steps) - 1})
    return tuple(curve.steps[i] for i in keep), tuple(curve.values[i] for i in keep)


def _natural(name: str) -> tuple[bool, float, str]:
    # Sort key: class "10" after class "9", names after numbers.
    return (False, float(name), "") if name.isdigit() else (True, 0.0, name)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
