"""The graph of a recipe as a tree of text, for terminals: `dvc dag` is 195 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from vitpipe.contracts.graph import Node


def graph_tree(nodes: Sequence[Node]) -> list[str]:
    """One line per stage, below the last of the stages that feed it; other feeders follow in brackets.

    Args:
        nodes: in running order.

    Returns:
        Lines of at most 100 columns for the stages of this repository.
    """
    feeders = {node.name: list(dict.fromkeys(node.inputs.values())) for node in nodes}
    order = [node.name for node in nodes]
    last = {name: max(feeders[name], key=order.index, default="") for name in order}
    # All of its edges would hide the others, so it stands at the end.
    at_end = [node.name for node in nodes if node.stage.takes_every_stage]
    children = {
        name: [other for other in order if last[other] == name and other not in at_end] for name in order
    }

    def above(name: str) -> set[str]:
        return {name, *above(last[name])} if name else set()

    def lines(name: str, first: str, rest: str) -> list[str]:
        # Everything reads the prepared data; the tree shows it for those that hang on it directly.
        others = [feeder for feeder in feeders[name] if feeder not in above(last[name])]
        found = [f"{first}{name} (and {', '.join(others)})" if others else f"{first}{name}"]
        for child in children[name]:
            is_last = child == children[name][-1]
            found += lines(child, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))
        return found

    roots = [name for name in order if not feeders[name] and name not in at_end]
    tree = [line for root in roots for line in lines(root, "", "")]
    return tree + [f"{name} (reads every stage)" for name in at_end]
