"""Masks in COCO's encodings: polygons along pixel edges, run lengths for crowds.

Both are exact: rasterised by pycocotools they give the same mask.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Point = tuple[int, int]


def polygons(mask: Mask) -> list[list[float]]:
    """Closed polygons [x1, y1, x2, y2, ...] in pixel-edge coordinates whose union is the (H, W) mask."""
    loops = _loops(mask)
    hole = next((loop for loop in loops if _doubled_area(loop) < 0), None)
    if hole is None:
        return [[float(value) for point in loop for value in point] for loop in loops]
    # COCO's polygons have no holes and are merged by union, so the mask is divided: a vertical cut behind
    # the first column of the hole opens the hole towards both parts. Recursion handles the other holes.
    cut = min(x for x, _ in hole) + 1
    left, right = mask.copy(), mask.copy()
    left[:, cut:], right[:, :cut] = False, False
    return polygons(left) + polygons(right)


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed RLE: lengths of runs of 0 and 1 in turn, column by column, beginning with 0."""
    column_major = mask.ravel(order="F")
    # `prepend=False` makes a mask that begins with 1 start with a run of no zeros, as the format requires.
    changes = np.flatnonzero(np.diff(column_major, prepend=False)).tolist()
    edges = [0, *changes, column_major.size]
    return {"counts": [b - a for a, b in pairwise(edges)], "size": list(mask.shape)}


def bounding_box(mask: Mask) -> list[float]:
    """[x, y, width, height] of the mask's pixels, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [float(x), float(y), float(columns[-1] - x + 1), float(rows[-1] - y + 1)]


def _loops(mask: Mask) -> list[list[Point]]:
    """Boundary loops of the 4-connected parts, corners only; outer ones clockwise, holes counterclockwise."""
    # Every unit edge between inside and outside is directed with the inside on its right (y points down).
    # A point has two successors where two parts touch at a corner.
    following: dict[Point, list[Point]] = {}
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    for dy, dx, tail, head in (
        (-1, 0, (0, 0), (1, 0)),
        (0, 1, (1, 0), (1, 1)),
        (1, 0, (1, 1), (0, 1)),
        (0, -1, (0, 1), (0, 0)),
    ):
        outside = ~padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(inside & outside).tolist():
            following.setdefault((x + tail[0], y + tail[1]), []).append((x + head[0], y + head[1]))
    loops = []
    while following:
        start = next(iter(following))
        loops.append(_follow(start, following))
    return loops


def _follow(start: Point, following: dict[Point, list[Point]]) -> list[Point]:
    """Walk one loop, removing its edges from `following`; returns only the points where it turns."""
    path = [start, _take(start, following[start][0], following)]
    while path[-1] != start or (start in following and not _closes(path, following)):
        before, here = path[-2], path[-1]
        step = (here[0] - before[0], here[1] - before[1])
        # In order of preference: right, straight on, left. Right keeps parts that touch at a corner separate.
        turns = ((-step[1], step[0]), step, (step[1], -step[0]))
        wanted = [(here[0] + dx, here[1] + dy) for dx, dy in turns]
        path.append(_take(here, next(point for point in wanted if point in following[here]), following))
    ring = path[:-1]
    # Points between two edges of the same direction are dropped: COCO stores corners.
    return [
        point
        for before, point, after in zip([ring[-1], *ring], ring, [*ring[1:], ring[0]], strict=False)
        if not (before[0] == point[0] == after[0] or before[1] == point[1] == after[1])
    ]


def _closes(path: list[Point], following: dict[Point, list[Point]]) -> bool:
    """At a start point that two parts share: whether the right turn is the first edge of this loop."""
    before, here, first = path[-2], path[-1], path[1]
    step = (here[0] - before[0], here[1] - before[1])
    return (here[0] - step[1], here[1] + step[0]) == first


def _take(tail: Point, head: Point, following: dict[Point, list[Point]]) -> Point:
    following[tail].remove(head)
    if not following[tail]:
        del following[tail]
    return head


def _doubled_area(loop: list[Point]) -> int:
    """Twice the signed area (shoelace formula), an integer; positive for outer loops."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(loop, [*loop[1:], loop[0]], strict=True))
