"""What MLflow shows of a recipe: a title that tells two runs apart, and the parameters that the run reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.graph import all_stages

# Descriptions and expected values, not parameters of the run.
_DESCRIBED = ("summary", "source", "expect", "discrepancies", "report")
# Where the data lie changes nothing; which stages there are is seen below the title.
_NOT_TOLD = ("name", "profile", "seed", "stages", "data.root", "data.store", "data.sets", "data.workers")
_NAMED = 3  # differences that a title names; more do not fit MLflow's column


def run_title(recipe: Recipe) -> str:
    """`itpn/pixel_base (demo, seed 3, finetune.epochs=5)`."""
    changed = [f"{key}={value.removesuffix('.0')}" for key, value in overridden(recipe).items()]
    more = [f"{len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
    return f"{recipe.name} ({', '.join([recipe.profile, f'seed {recipe.seed}', *changed[:_NAMED], *more])})"


def overridden(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> value of what differs from the recipe as it is written; the seed is not among them.

    Empty where the recipe's file is not here, as in a container that got its values from a package.
    """
    try:
        written = load_recipe(recipe.name, recipe.profile)
    except RecipeError:
        return {}
    values = sections_in_use(recipe)
    ours, theirs = flatten(values), flatten(sections_in_use(written))
    keys = (*ours, *(key for key in theirs if key not in ours))
    return {
        key: ours.get(key, "null")
        # `data` last: small sets are often chosen by many of its keys, and a title has room for three.
        for key in sorted(keys, key=lambda key: key.startswith("data."))
        # Of a stage that the run does not have, nothing is overridden.
        if key not in _NOT_TOLD and key.split(".")[0] in values and ours.get(key) != theirs.get(key)
    }


def sections_in_use(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values without those that this run does not read.

    Left out are the sections of stages that the recipe does not have, and of `data` what belongs to another
    source than the run's.
    """
    values = recipe.model_dump(mode="json")
    absent = {name for name in all_stages() if name not in recipe.stages}
    kept = {key: value for key, value in values.items() if key not in {*_DESCRIBED, *absent}}
    other_sources = {"embedded": "embedded", "pinned": "pinned", "root": "folders", "own_sets": "folders"}
    kept["data"] = {
        key: value
        for key, value in values["data"].items()
        if other_sources.get(key, recipe.data.source) == recipe.data.source
    }
    return kept


def compared_values(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> value of what two runs of the chain are compared by in MLflow.

    Left out of `sections_in_use` are values that do not decide the weights, and those of `data` except its
    source: MLflow lists parameters by name, and sizes of the data and of batches in evaluation would come
    first. The data are compared by the digests of the datasets, which the run lists; how a number was
    measured stands in the table `protocol` of its stage.
    """
    deciding = {"name", "profile", "data.source", *flatten(recipe.acting(on_weights_only=True))}
    return {
        key: value
        for key, value in flatten(sections_in_use(recipe)).items()
        if key in deciding and (not key.startswith("data.") or key == "data.source")
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b` -> text, without None and empty values."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None and value != "" and value != [] and value != ():
            flat[f"{prefix}{key}"] = str(value)
    return flat
