"""A recipe as one short text, which Kubeflow's packages carry to machines that do not have its file.

Each task gets the part that decides it: Kubeflow runs a task again when one of its parameters changes, and
an edit of the fine-tuning must not repeat weeks of pre-training.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from vitpipe.config.read import parse_override, recipe_of, recipe_values
from vitpipe.config.recipe import Recipe
from vitpipe.config.yaml_core import read_yaml, write_yaml
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.graph import Node, all_stages

# Kubeflow refuses parameters of more characters.
MAX_CHARACTERS = 10_000
_GRAPH_KEYS = ("stages", "start_from")
_WHERE = "pipeline parameter 'overrides'"


def is_fixed(override: str) -> bool:
    """Whether an override is of a value that a package has fixed: the graph, the datasets."""
    key = override.partition("=")[0].strip()
    return key == "data.sets" or key.partition(".")[0] in _GRAPH_KEYS


def carried_recipe(name: str, recipe: Recipe, node: Node, nodes: Iterable[Node]) -> str:
    """The part of a recipe that one of its stages needs, without overrides, compressed.

    Args:
        name: by which the recipe was read.
        recipe: with all overrides; its graph and its datasets are carried.
        node: the stage.
        nodes: the graph.

    Raises:
        RecipeError: it is too long for Kubeflow.
    """
    by_name = {found.name: found for found in nodes}
    upstream = _upstream(node, by_name)
    values = recipe_values(name, recipe.profile)
    if "expect" not in node.stage.sections:
        values = _deciding(values, upstream)
    fixed = {
        "stages": [stage for stage in recipe.stages if stage in upstream],
        "start_from": {stage: feeder for stage, feeder in recipe.start_from.items() if stage in upstream},
        # `auto` stands for what all stages read, and not all of them are in this part.
        "data": {"sets": list(recipe.data.sets)},
    }
    document = write_yaml({"values": values, "fixed": fixed})
    # URL-safe, because Kubeflow and Kubernetes replace what stands in {{}} and $().
    text = base64.urlsafe_b64encode(zlib.compress(document.encode(), 9)).decode()
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"The recipe takes {len(text):,} characters compressed, Kubeflow allows {MAX_CHARACTERS:,} in a "
            "parameter",
            where=f"recipe {name}, stage {node.name}",
            fix="shorten its lists and texts, such as `discrepancies`",
        )
    return text


def _upstream(node: Node, by_name: Mapping[str, Node]) -> set[str]:
    """The stage and all that it depends on."""
    found = {node.name}
    for feeder in node.inputs.values():
        found |= _upstream(by_name[feeder], by_name)
    return found


def _deciding(values: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
    """Recipe values without those of other stages, and without what only the report shows."""
    left_out = (all_stages().keys() - kept) | {"start_from", "expect", "discrepancies"}
    # A recipe must have a summary, and nobody reads it in a pod.
    return {key: value for key, value in values.items() if key not in left_out} | {"summary": ""}


def recipe_from(name: str, profile: str, text: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that a task's text carries, with the overrides that concern it.

    Args:
        name, profile: of the recipe where it was compiled.
        text: as `carried_recipe`.
        overrides: of the stage and of the run.

    Raises:
        InputError: the text is damaged.
        RecipeError: a value is wrong; an override changes the graph, or names a dataset that the package does
            not prepare.
    """
    try:
        document = read_yaml(zlib.decompress(base64.b64decode(text, altchars=b"-_", validate=True)).decode())
        values, fixed = document["values"], document["fixed"]
        stages, sets = fixed["stages"], fixed["data"]["sets"]
    # ValueError includes text that is not UTF-8.
    except (binascii.Error, zlib.error, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            "The recipe that the package carries is damaged",
            where=f"parameter 'recipe_values', recipe {name}",
            fix="compile the package again",
        ) from error
    kept = []
    for override in overrides:
        ((section, value),) = parse_override(override, _WHERE).items()
        keys = value if isinstance(value, Mapping) else {}
        dataset = keys.get("dataset") if section in all_stages() else None
        problem = ""
        if section in _GRAPH_KEYS:
            problem = "changes the graph, which is fixed in a package"
        elif dataset is not None and dataset not in sets:
            problem = f"names a dataset that the package does not prepare ({', '.join(sets)})"
        elif section == "data" and set(keys.get("sets") or sets) not in (set("auto"), set(sets)):
            problem = f"names other datasets than those that the package prepares ({', '.join(sets)})"
        if problem:
            raise RecipeError(
                f"'{override}' {problem}",
                where=_WHERE,
                fix="give it when the package is compiled: vitpipe compile --set",
            )
        # Another stage's override changes nothing here.
        if section not in all_stages() or section in stages:
            kept.append(override)
    # Last, because an override of the compiled run may be `data.sets=auto`, which means less in a part.
    kept += [f"{key}={write_yaml(value).strip()}" for key, value in fixed.items()]
    return recipe_of(values, kept, name, profile, name)
