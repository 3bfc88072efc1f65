"""In which acting values two recipes differ, over a stage and all that feeds it. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitpipe.config.digest import recipe_sections
from vitpipe.config.recipe import Recipe
from vitpipe.config.telling_values import flat_values, value_text
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


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Key -> `finetune.epochs is 8, not 16` of each key whose values differ, in alphabetical order."""
    absent = object()
    pairs = ((key, ours.get(key, absent), theirs.get(key, absent)) for key in sorted({*ours, *theirs}))

    def text(value: Any) -> str:
        # In a sentence, unlike in a list of values, texts stand in quotes.
        is_text = isinstance(value, str)
        return "absent" if value is absent else json.dumps(value) if is_text else value_text(value)

    return {key: f"{key} is {text(here)}, not {text(there)}" for key, here, there in pairs if here != there}
