"""In which acting values two recipes differ, over a stage and all that feeds it. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitpipe.config.digest import recipe_sections
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Node

# Another seed is what a comparison is for; data are compared by what was prepared.
_NOT_COMPARED = {"seed", "data"}


def chain_of(nodes: Sequence[Node], stage: str) -> list[Node]:
    """A stage and all that feeds it, directly or not, in running order."""
    wanted, found = {stage}, []
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.inputs.values())
            found.append(node)
    return found[::-1]


def edges_of(chain: Sequence[Node]) -> dict[str, dict[str, str]]:
    """Stage -> its inputs: input name -> stage."""
    return {node.name: node.inputs for node in chain}


def acting_values(recipe: Recipe, chain: Sequence[Node]) -> dict[str, Any]:
    """Dotted key -> value of all that can change a result of the chain's last stage."""
    sections: dict[str, Any] = {}
    for node in chain:
        # What is measured and logged of an earlier stage does not reach the last one.
        is_earlier = node is not chain[-1]
        names = [name for name in node.stage.sections if name not in _NOT_COMPARED]
        sections |= recipe_sections(recipe, names, on_weights_only=is_earlier)
    return flat_values(sections)


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat_values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Key -> `finetune.epochs is 8, not 16` of each key whose values differ, in alphabetical order."""
    absent = object()
    pairs = ((key, ours.get(key, absent), theirs.get(key, absent)) for key in sorted({*ours, *theirs}))

    def text(value: Any) -> str:
        # Numbers as people write them: whole floats (epochs) without a point.
        is_whole = isinstance(value, float) and value.is_integer()
        return "absent" if value is absent else json.dumps(int(value) if is_whole else value)

    return {key: f"{key} is {text(here)}, not {text(there)}" for key, here, there in pairs if here != there}
