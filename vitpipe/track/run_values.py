"""What MLflow shows of a recipe: the parameters that the run reads, and those that runs are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitpipe.config.recipe import Recipe
from vitpipe.config.run_name import sections_in_use


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
