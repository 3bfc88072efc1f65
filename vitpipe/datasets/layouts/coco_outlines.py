"""Outlines of COCO's objects: polygons, or run lengths in either of COCO's two codings.

Source: `common/maskApi.c` of the COCO API (Lin et al., ECCV 2014); written here in numpy, because preparing
data needs no detection library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_POINTS = 3  # of the smallest polygon
# One character of compressed run lengths holds 5 bits and a flag of continuation, counted from '0' on.
_FIRST_CHARACTER, _BITS, _MORE, _SIGN = 48, 5, 0x20, 0x10


class Outline(NamedTuple):
    """What the `segmentation` of one annotation says.

    Attributes:
        usable: the polygons or run lengths that can be used; None if there are none.
        problem: why the whole field or a part of it cannot be used; empty if all of it can.
        size: (H, W) that run lengths fill; None for polygons.
    """

    usable: list[list[float]] | dict[str, Any] | None
    problem: str
    size: tuple[int, int] | None


_NOTHING = Outline(None, "no outline", None)


def outline_of(segmentation: Any) -> Outline:
    """Examine a `segmentation`: a list of polygons, or a dict of `counts` and `size` (H, W)."""
    if isinstance(segmentation, dict):
        return _of_runs(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return _NOTHING
    # One polygon without the list around it is a frequent slip of converters.
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    usable = [polygon for polygon in polygons if _is_polygon(polygon)]
    problem = (
        "" if len(usable) == len(polygons) else "polygons with fewer than 3 points or an odd number of values"
    )
    if not usable:
        return _NOTHING._replace(problem=problem)
    if polygons is not segmentation:
        problem = "one polygon instead of a list of polygons"
    return Outline(usable, problem, None)


def area_of(outline: Outline) -> float:
    """Pixels inside; exact for run lengths, else the sum of the polygons' areas."""
    if isinstance(outline.usable, dict):
        return float(_runs(outline.usable["counts"])[1::2].sum())
    return sum(map(_enclosed, outline.usable or ()))


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (H, W) of a `segmentation`; empty where `outline_of` finds nothing usable in it."""
    outline = outline_of(segmentation)
    if isinstance(outline.usable, dict):
        runs = _runs(outline.usable["counts"])
        if outline.size != (height, width):
            return np.zeros((height, width), bool)
        # COCO counts column by column, background first.
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(width, height).T
    mask = Image.new("L", (width, height))
    for polygon in outline.usable or ():
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.asarray(mask).astype(bool)


def _of_runs(segmentation: dict[str, Any]) -> Outline:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    damaged = _NOTHING._replace(problem="run lengths that do not fill their size")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        return damaged
    try:
        runs = _runs(counts)
    except (ValueError, TypeError, OverflowError):
        return damaged
    if runs.min(initial=0) < 0 or runs.sum() != size[0] * size[1]:
        return damaged
    return Outline(segmentation, "", (size[0], size[1])) if runs[1::2].any() else _NOTHING


def _runs(counts: Any) -> NDArray[np.int64]:
    """Run lengths as integers, from a list of them or from COCO's compressed text."""
    if isinstance(counts, list):
        if not all(type(count) is int for count in counts):
            raise TypeError("run lengths are whole numbers")
        return np.array(counts, np.int64)
    if not isinstance(counts, str):
        raise TypeError("run lengths are a list or a text")
    return np.array(_decompressed(counts), np.int64)


def _decompressed(text: str) -> list[int]:
    """COCO's compressed run lengths: numbers in base 32, from the fourth on as differences to two before."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in text.encode("ascii"):
        bits = character - _FIRST_CHARACTER
        if not 0 <= bits < 2 * _MORE:
            raise ValueError("a character that run lengths do not have")
        value |= (bits & (_MORE - 1)) << shift
        shift += _BITS
        if bits & _MORE:
            continue
        if bits & _SIGN:  # the highest bit of the last character is the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the last number is cut")
    return runs


def _is_polygon(polygon: Any) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 2 * _POINTS
        and len(polygon) % 2 == 0
        # Without a loop in Python: COCO's training set has 35 million of these numbers.
        and set(map(type, polygon)) <= {int, float}
        and all(map(is_finite, polygon))
    )


def is_finite(value: float) -> bool:
    """Whether a number is finite, and no integer beyond what a float holds."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _enclosed(polygon: Sequence[float]) -> float:
    """Area of a polygon x0, y0, x1, y1, ... by the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    crossed = sum(
        x * next_y - next_x * y
        for x, y, next_x, next_y in zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    )
    return abs(crossed) / 2
