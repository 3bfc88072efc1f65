"""The graph of a run as a list with one row per stage, its edges drawn beside it as an SVG element.

A graph drawn from left to right is wider than a phone; rows below each other fit every screen and the printed
page, and a row has room for the stage's time as a bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitpipe.contracts.graph import Node

# Pixels: height of a row (as in style.css), between lanes, around a dot, of a dot, of a rounded corner.
ROW_HEIGHT = 50
_LANE, _MARGIN, _DOT, _CORNER = 15, 9, 5, 7


@dataclass(frozen=True)
class NodeText:
    """What a row shows; `share_ratio`, its share of the run's total time (0 to 1), is drawn as a bar."""

    time: str
    share_ratio: float
    has_run: bool
    note: str = ""
    link: str = ""


@dataclass(frozen=True)
class GraphRow:
    """One stage of the drawn graph.

    Attributes:
        reads: the stages that feed it; the data's only where nothing else does.
    """

    name: str
    reads: tuple[str, ...]
    text: NodeText


@dataclass(frozen=True)
class DrawnGraph:
    """Rows in running order, and the SVG element of the edges beside them, `width` pixels wide."""

    rows: tuple[GraphRow, ...]
    edges: str
    width: int


def draw_graph(nodes: Sequence[Node], texts: Mapping[str, NodeText]) -> DrawnGraph:
    """Draw the graph from top to bottom, without the edges that longer paths imply."""
    names = [node.name for node in nodes]
    place = {name: row for row, name in enumerate(names)}
    found = essential_edges(nodes)
    far = [(start, end) for start, end in found if place[end] > place[start] + 1]
    lanes = _lanes(far, place)
    width = 2 * _MARGIN + _LANE * (1 + max(lanes.values(), default=-1))
    near = [
        f'<path class="edge" d="M{_x(width)} {_y(place[start])}V{_y(place[end])}"/>'
        for start, end in found
        if place[end] == place[start] + 1
    ]
    curved = [_edge(width, lanes[edge], place[edge[0]], place[edge[1]]) for edge in far]
    dots = [
        f'<circle class="dot{"" if texts[name].has_run else " absent"}" cx="{_x(width)}" '
        f'cy="{_y(place[name])}" r="{_DOT}"/>'
        for name in names
    ]
    # Hidden from screen readers: every row says what its stage reads.
    svg = (
        f'<svg viewBox="0 0 {width} {ROW_HEIGHT * len(names)}" width="{width}" '
        f'height="{ROW_HEIGHT * len(names)}" aria-hidden="true">{"".join([*near, *curved, *dots])}</svg>'
    )
    reads = {node.name: tuple(sorted({start for start, end in found if end == node.name})) for node in nodes}
    rows = tuple(GraphRow(name, reads[name], texts[name]) for name in names)
    return DrawnGraph(rows, svg, width)


def essential_edges(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Edges (from, to) that no longer path implies: the transitive reduction of the graph."""
    feeds = {node.name: set(node.inputs.values()) for node in nodes}

    def ancestors(name: str) -> set[str]:
        return {x for feeder in feeds[name] for x in (feeder, *ancestors(feeder))}

    return [
        (feeder, name)
        for name, feeders in feeds.items()
        for feeder in sorted(feeders)
        if not any(feeder in ancestors(other) for other in feeders)
    ]


def _lanes(far: Sequence[tuple[str, str]], place: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Edge -> lane left of the dots: edges into one stage, or else out of one, share a lane.

    Lane 0 is the nearest; no two lanes of one number overlap.
    """
    into = {end: sum(other == end for _, other in far) for _, end in far}
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for start, end in far:
        groups.setdefault(("into", end) if into[end] > 1 else ("out of", start), []).append((start, end))
    found: dict[tuple[str, str], int] = {}
    taken: list[list[tuple[int, int]]] = []
    # Short ones first, so that they are inside of the long ones.
    spans = {key: (min(place[a] for a, _ in g), max(place[b] for _, b in g)) for key, g in groups.items()}
    for key in sorted(groups, key=lambda key: (spans[key][1] - spans[key][0], spans[key])):
        first, last = spans[key]
        lane = next(
            (i for i, used in enumerate(taken) if all(last <= a or first >= b for a, b in used)), len(taken)
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        found |= dict.fromkeys(groups[key], lane)
    return found


def _x(width: int) -> int:
    return width - _MARGIN


def _y(row: int) -> int:
    return ROW_HEIGHT * row + ROW_HEIGHT // 2


def _edge(width: int, lane: int, start: int, end: int) -> str:
    x, left, r = _x(width), _x(width) - _LANE * (lane + 1), _CORNER
    out = f"M{x} {_y(start)}H{left + r}q{-r} 0 {-r} {r}"
    return f'<path class="edge" d="{out}V{_y(end) - r}q0 {r} {r} {r}H{x}"/>'
