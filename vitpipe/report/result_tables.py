"""Formatting of metrics with their units, and the result tables of a run.

Accuracies are ratios (0 to 1) in the files and percent in the report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.graph import all_stages
from vitpipe.contracts.protocol import PROTOCOL, WARNINGS
from vitpipe.contracts.units import (
    format_billions,
    format_bytes,
    format_count,
    format_duration,
    format_millions,
)

LONG_TABLE_ROWS = 12
MILLIONS = "M"  # the unit of parameters in published rows
# The class table of ImageNet-22K has 21,841 rows: the page shows the first ones, the CSV file has all.
_MAX_ROWS = 300
# A git commit has 40 hexadecimal digits, a SHA-256 has 64.
_DIGEST = re.compile(r"[0-9a-f]{40,}")
# Key of the metric -> label, in the order in which pycocotools prints its summary.
_COCO_ROWS = (
    ("AP", "AP"),
    ("AP50", "AP₅₀"),
    ("AP75", "AP₇₅"),
    ("AP_small", "AP small"),
    ("AP_medium", "AP medium"),
    ("AP_large", "AP large"),
    ("AR1", "AR₁"),
    ("AR10", "AR₁₀"),
    ("AR100", "AR₁₀₀"),
    ("AR_small", "AR small"),
    ("AR_medium", "AR medium"),
    ("AR_large", "AR large"),
)
# Names of ratios: classification, mmseg's IoUMetric, DAVIS (J and F).
_PERCENT = {"top1", "top5", "mIoU", "aAcc", "mAcc", "IoU", "Acc", "JF_mean"}
_PERCENT |= {"positive_share", "probability"}  # of stage explain
_PERCENT |= {f"{measure}_{name}" for measure in "JF" for name in ("mean", "recall", "decay")}
_PERCENT_MARKS = ("_top1", "_top5", "AP", "AR", "ratio", "_mIoU")
# Shown as figures (history, confusion), as the COCO table (box_ap, mask_ap), in the data section (splits,
# sources) or on top of the page (verdict, reference).
_SHOWN_ELSEWHERE = ("history", "confusion", "box_ap", "mask_ap", "splits", "sources", "verdict", "reference")
# The table of what a network costs, with the conventions, and the metrics that are in it.
_COST, _COSTS = "cost", ("params", "gmacs")
# In the order in which a reader looks for them, behind a stage's main metric; all others follow.
_ORDER = (
    "top1", "top5", "linear_top1", "linear_best_epoch_top1", "knn_top1", "knn_top5", "mIoU", "mAcc", "aAcc",
    "JF_mean", "J_mean", "F_mean", "J_recall", "F_recall", "J_decay", "F_decay",
    "loss", "trivial_loss", "params", "gmacs", "images_per_second",
)  # fmt: skip
_LABELS = {
    "params": "parameters",
    "gmacs": "multiply-adds",  # multiply-accumulate operations; a FLOP count would be twice as large
    "knn_top1": "k-NN top-1",
    "random_knn_top1": "k-NN top-1 of random weights",
    "knn_top5": "k-NN top-5",
    "random_knn_top5": "k-NN top-5 of random weights",
    "linear_top1": "linear top-1",
    "random_linear_top1": "linear top-1 of random weights",
    "linear_best_epoch_top1": "linear top-1, best epoch",
    "random_linear_best_epoch_top1": "linear top-1, best epoch, of random weights",
    "cached_linear_top1": "linear top-1, centre crops",
    "random_cached_linear_top1": "linear top-1, centre crops, of random weights",
    "cached_linear_best_epoch_top1": "linear top-1, centre crops, best epoch",
    "random_cached_linear_best_epoch_top1": "linear top-1, centre crops, best epoch, of random weights",
    "trivial_loss": "loss of the best guess that sees no image",
    "aAcc": "pixel accuracy",  # mmseg's names: all pixels, and the mean over classes
    "mAcc": "mean class accuracy",
    "JF_mean": "J&F mean",
    "memory_gib": "memory, GiB",
    "grad_norm": "gradient norm",
}
_TITLES = {
    "per_class": "Per class",
    "weights_account": "Loaded weights by key",
    "plan": "Derived values of the run",
    "cost": "Network cost",
    "linear_sweep": "Learning rates of the linear classifier",
    "video_objects": "Objects of the videos",
    "video_sequences": "Videos",
    "agreement": "Comparison with the training stage",
    "classes": "Classes",
    "findings": "Irregular images",
    "splits": "Splits",
}


@dataclass(frozen=True)
class ShownTable:
    """A formatted table: `rows` are texts, `numeric` marks the columns to align right.

    Attributes:
        note: a sentence below it; empty for none.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left_out: int = 0
    note: str = ""

    @property
    def num_rows(self) -> int:
        """Rows of the whole table, including those that are not shown."""
        return len(self.rows) + self.num_left_out

    @property
    def is_long(self) -> bool:
        """Whether the table is collapsed on the page."""
        return self.num_rows > LONG_TABLE_ROWS


def headline(stage: str) -> str:
    """The main metric of a stage; empty for a stage that has none, or that is no longer there."""
    entry = all_stages().get(stage)
    return entry.headline if entry else ""


def is_percent(name: str) -> bool:
    """Whether a metric is a ratio that is shown in percent."""
    # `val/ema_top1` is the top-1 accuracy of the averaged (EMA) weights.
    last = name.rpartition("/")[2].removeprefix("ema_").removeprefix("random_")
    return last in _PERCENT or any(mark in last for mark in _PERCENT_MARKS)


def show(name: str, value: float, extra_digits: int = 0) -> str:
    """A metric with its unit: `95.3 %`, `86.4 M`, `1,234`, `0.0312`.

    Args:
        extra_digits: beyond those that a reader needs; then numbers are not shortened to millions or minutes.
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if is_percent(name):
        return f"{100 * value:.{1 + extra_digits}f} %"
    if extra_digits == 0 and name.endswith("params"):
        return format_millions(value)
    if extra_digits == 0 and name.endswith("gmacs"):
        return format_billions(value * 1e9)
    if extra_digits == 0 and name.endswith("_bytes"):
        return format_bytes(value)
    if extra_digits == 0 and name.endswith("seconds"):
        return format_duration(value)
    # From 2^53 (9e15) on every float is whole, so "whole" then no longer means a count.
    if value == int(value) and abs(value) < 1e15:
        return format_count(value)
    if extra_digits == 0 and abs(value) >= 1000:
        return format_count(value)
    return f"{value:.{4 + extra_digits}g}"


def told_apart(values: Sequence[float], text: Callable[[float, int], str]) -> list[str]:
    """Texts of numbers, with as many digits as it takes that different ones look different.

    Args:
        text: of a number with so many extra digits.
    """
    # 17 significant digits tell any two floats apart; the texts of NaN are equal, unlike the values.
    num_different = len({repr(value) for value in values})
    for extra_digits in range(17):
        texts = [text(value, extra_digits) for value in values]
        if len(set(texts)) == num_different:
            return texts
    return [repr(value) for value in values]


def in_unit(value: float | str | None, unit: str, decimals: int | None = None) -> str:
    """A number in a published row's unit: `85.5 %`, `79 M`; an em dash for None.

    Args:
        decimals: fixed number of decimals, for published numbers; default: as needed, at most two.
    """
    if value is None or isinstance(value, str):
        return value or "—"
    digits = f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 1000 else format_count(value)
    if unit == MILLIONS and decimals is None:
        decimals = decimals_of_millions(value)
    if decimals is not None:
        digits = f"{value:,.{decimals}f}"
    return f"{digits} {'%' if unit == 'percent' else unit}".strip()


def decimals_of_millions(value: float) -> int:
    """Decimals of a number of parameters in millions, the same everywhere: 0.22 M, 1.23 M, 86.4 M."""
    return 2 if abs(value) < 10 else 1


def metric_label(name: str) -> str:
    """`box_AP50` -> `box AP50`, `linear_top1` -> `linear top-1`."""
    if name in _LABELS:
        return _LABELS[name]
    text = name.removeprefix("num_").replace("_", " ")
    return text.replace("top1", "top-1").replace("top5", "top-5")


def coco_table(metrics: Mapping[str, float]) -> ShownTable | None:
    """The twelve COCO metrics in percent, a column for boxes and one for masks; None without them."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_AP" in metrics]
    if not kinds:
        return None
    rows = [(label, *(_percent(metrics.get(f"{kind}_{key}")) for kind in kinds)) for key, label in _COCO_ROWS]
    columns = ("COCO, in percent", *(f"{kind}es" if kind == "box" else "masks" for kind in kinds))
    return ShownTable("coco", "COCO metrics", columns, (False, True, True)[: len(columns)], tuple(rows))


def metric_table(artifact: Artifact) -> ShownTable | None:
    """All metrics of a stage except those of other tables, COCO's and the cost's; the main metric first."""
    costs = _COSTS if artifact.tables().get(_COST) else ()
    own = {
        k: v for k, v in artifact.metrics.items() if not k.startswith(("box_A", "mask_A")) and k not in costs
    }
    if not own:
        return None
    ordered = by_interest(artifact.card.stage, own)
    rows = tuple((metric_label(name), show(name, own[name])) for name in ordered)
    return ShownTable("metrics", "Metrics", ("metric", "value"), (False, True), rows)


def by_interest(stage: str, names: Iterable[str]) -> list[str]:
    """Names of a stage's metrics in the order in which a reader looks for them, its main metric first."""
    first = headline(stage)
    return sorted(names, key=lambda name: (name != first, *_rank(name)))


def _rank(name: str) -> tuple[bool, int]:
    """Place of a metric: of the trained weights, then of averaged and random ones and of several sizes."""
    own = name.removeprefix("ema_").removeprefix("random_").removeprefix("multi_scale_")
    own = own.removeprefix("cached_")
    return own != name, _ORDER.index(own) if own in _ORDER else len(_ORDER)


def protocol_table(rows: Sequence[Mapping[str, str]]) -> ShownTable | None:
    """How a stage measured: each setting once, with the metrics that it holds for; None without any."""
    metrics = dict.fromkeys(row["metric"] for row in rows)
    found: dict[tuple[str, str], dict[str, None]] = {}  # an inner dict is an ordered set
    for row in rows:
        found.setdefault((row["setting"], row["value"]), {})[row["metric"]] = None
    cells = tuple(
        (*pair, "all" if len(own) == len(metrics) else ", ".join(map(metric_label, own)))
        for pair, own in found.items()
    )
    if not cells:
        return None
    return ShownTable("protocol", "How it was measured", ("setting", "value", "metrics"), (False,) * 3, cells)


def stage_tables(artifact: Artifact, class_names: Mapping[str, str] | None = None) -> list[ShownTable]:
    """The CSV tables of a stage, short ones first, with class names instead of class keys."""
    known = class_names or {}
    found = [
        shown_table(
            name, [{k: known.get(v, v) if k == "class" else v for k, v in row.items()} for row in rows]
        )
        for name, rows in artifact.tables().items()
        if name not in (*_SHOWN_ELSEWHERE, PROTOCOL, WARNINGS) and rows
    ]
    measured = protocol_table(artifact.tables().get(PROTOCOL, []))
    return sorted(filter(None, (*found, measured)), key=lambda table: len(table.rows))


def shown_table(name: str, rows: Sequence[Mapping[str, str]]) -> ShownTable:
    """A formatted CSV table: ratios in percent, counts with thousands separators, sizes with their unit."""
    if name == _COST:
        # Each number in its own unit, as everywhere.
        rows = [{**row, "value": _cost(row["name"], row["value"])} for row in rows]
        rows = [{k: metric_label(v) if k == "name" else v for k, v in row.items()} for row in rows]
    columns = tuple(rows[0])
    # An empty cell is a missing number: it must not turn the column into text.
    numeric = tuple(all(_number(row[c]) is not None or row[c] == "" for row in rows) for c in columns)
    texts = tuple(
        tuple(
            _cell(column, row[column]) if is_number else _text(row[column])
            for column, is_number in zip(columns, numeric, strict=True)
        )
        for row in rows[:_MAX_ROWS]
    )
    title = _TITLES.get(name, name.replace("_", " ").capitalize())
    heads = tuple(_head(column) for column in columns)
    return ShownTable(name, title, heads, numeric, texts, len(rows) - len(texts))


def markdown(table: ShownTable, *, has_markup: bool = False) -> str:
    """The table in Markdown (GitHub's syntax).

    Args:
        has_markup: the cells are ours and use Markdown; else they are text, such as names of classes.
    """

    # A pipe or a line break inside a cell would end it.
    def line(cells: Sequence[str]) -> str:
        texts = cells if has_markup else map(markdown_text, cells)
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    rule = "|" + "|".join(" ---: " if right else " --- " for right in table.numeric) + "|"
    return "\n".join([line(table.columns), rule, *(line(row) for row in table.rows)])


def markdown_text(text: object) -> str:
    """Text for Markdown that is shown as it is: no HTML, link, emphasis, code or formula starts in it."""
    plain = " ".join(str(text).splitlines())
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\\", "\\\\")):
        plain = plain.replace(sign, shown)
    # An underscore inside a word, as in most of our names, starts nothing and stays readable.
    return re.sub(r"[*`\[\]$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", plain)


def _percent(value: float | None) -> str:
    return "—" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _cost(name: str, text: str) -> str:
    value = _number(text)
    if value is None:
        return text
    is_work = name.endswith(("macs", "flops"))
    return f"{value / 1e9:.3g} G" if is_work and not name.startswith("g") else show(name, value)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _head(column: str) -> str:
    if column.endswith("_bytes"):
        return metric_label(column.removesuffix("_bytes"))  # the cells name the unit
    return metric_label(column) + (", %" if is_percent(column) else "")


def _text(value: str | None) -> str:
    """A cell that is not a number; digests are shortened."""
    return f"{value[:12]}…" if value and _DIGEST.fullmatch(value) else value or ""


def _cell(column: str, text: str) -> str:
    value = _number(text)
    if value is None or math.isnan(value):
        return "—"
    if is_percent(column):
        return f"{100 * value:.1f}"
    if column.endswith("_bytes"):
        return format_bytes(value)
    if value == int(value) and abs(value) < 1e15:
        return format_count(value)
    return f"{value:.5g}"
