"""The graph of a run as an SVG element: its stages in order, each with its time and main result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from vitpipe.contracts.graph import Node

# Pixels, of a node and between nodes.
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 152, 76, 40, 20, 4


@dataclass(frozen=True)
class NodeText:
    """Text of a node; `share_ratio`, its share of the run's total time (0 to 1), is drawn as a bar."""

    time: str
    result: str
    share_ratio: float
    has_run: bool
    link: str = ""


def draw_graph(nodes: tuple[Node, ...], texts: Mapping[str, NodeText]) -> str:
    """Draw the graph from left to right, without the edges that longer paths imply."""
    places = _places(nodes)
    columns = 1 + max((x for x, _ in places.values()), default=0)
    lanes = 1 + max((y for _, y in places.values()), default=0)
    width = 2 * _MARGIN + columns * _WIDTH + (columns - 1) * _GAP_X
    height = 2 * _MARGIN + lanes * _HEIGHT + (lanes - 1) * _GAP_Y
    edges = "".join(_edge(places[a], places[b]) for a, b in essential_edges(nodes))
    drawn = "".join(_node(node.name, places[node.name], texts[node.name]) for node in nodes)
    # The minimum width keeps the text readable on a phone: the page scrolls the figure instead of shrinking
    # it.
    return (
        f'<svg class="graph" viewBox="0 0 {width} {height}" style="min-width:{round(width * 0.78)}px" '
        f'role="img" aria-label="The stages of the run in order">{edges}{drawn}</svg>'
    )


def essential_edges(nodes: tuple[Node, ...]) -> list[tuple[str, str]]:
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


def _places(nodes: tuple[Node, ...]) -> dict[str, tuple[int, int]]:
    """(column, lane) per stage: the column is the longest path from the start, lanes fill from the top."""
    column: dict[str, int] = {}
    for node in nodes:
        column[node.name] = 1 + max((column[f] for f in node.inputs.values()), default=-1)
    longest = _longest_path(nodes)
    places: dict[str, tuple[int, int]] = {}
    taken: dict[int, int] = {}
    for node in sorted(nodes, key=lambda n: n.name not in longest):  # the longest path is the top lane
        x = column[node.name]
        lane = 0 if node.name in longest else max(1, taken.get(x, 1))
        places[node.name] = (x, lane)
        taken[x] = lane + 1
    return places


def _longest_path(nodes: tuple[Node, ...]) -> set[str]:
    best: dict[str, list[str]] = {}
    for node in nodes:
        before = sorted((best[feeder] for feeder in node.inputs.values()), key=len)
        best[node.name] = [*(before[-1] if before else []), node.name]
    paths = sorted(best.values(), key=len)
    return set(paths[-1]) if paths else set()


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    x, y = place
    return _MARGIN + x * (_WIDTH + _GAP_X), _MARGIN + y * (_HEIGHT + _GAP_Y)


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = _corner(start), _corner(end)
    x0, y0, y1 = x0 + _WIDTH, y0 + _HEIGHT // 2, y1 + _HEIGHT // 2
    if y0 == y1:
        return f'<path class="edge" d="M{x0} {y0}H{x1}"/>'
    # Vertical part directly after the source when it goes down, directly before the target when it goes up:
    # the edges of several lanes then share it.
    turn, r = (x0 + _GAP_X // 2) if y1 > y0 else (x1 - _GAP_X // 2), 10
    sign = 1 if y1 > y0 else -1
    return (
        f'<path class="edge" d="M{x0} {y0}H{turn - r}q{r} 0 {r} {sign * r}V{y1 - sign * r}'
        f'q0 {sign * r} {r} {sign * r}H{x1}"/>'
    )


def _node(name: str, place: tuple[int, int], text: NodeText) -> str:
    x, y = _corner(place)
    # 24: padding of 12 on both sides; 8 pixels per character of the time at font size 12.
    track = _WIDTH - 24 - (8 * len(text.time) if text.time else 0)
    # At least 3 pixels, so that a stage of seconds beside one of days is visible.
    bar = max(3.0, track * text.share_ratio) if text.has_run else 0
    kind = "node" if text.has_run else "node absent"
    inside = (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="10"/>'
        f'<text class="name" x="{x + 12}" y="{y + 23}">{escape(name)}</text>'
        f'<text class="result" x="{x + 12}" y="{y + 42}">{escape(text.result)}</text>'
    )
    if text.time:
        inside += (
            f'<rect class="track" x="{x + 12}" y="{y + 57}" width="{track}" height="5" rx="2.5"/>'
            f'<rect class="share" x="{x + 12}" y="{y + 57}" width="{bar:.1f}" height="5" rx="2.5"/>'
            f'<text class="time" x="{x + _WIDTH - 12}" y="{y + 64}">{escape(text.time)}</text>'
        )
    return f'<a href="#{escape(text.link)}">{inside}</a>' if text.link else inside
