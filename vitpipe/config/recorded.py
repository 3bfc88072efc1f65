"""The values of a recipe that are kept with a result, and the recipe that they make again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import RecipeError

# What only describes a recipe: it changes no result.
DESCRIBING = {"name", "profile", "summary", "source", "expect", "discrepancies", "report"}


def recorded_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values without what only describes it; passwords in addresses are hidden."""
    plain = recipe.model_dump(mode="json")
    return {key: value for key, value in plain.items() if key not in DESCRIBING}


def recipe_as_recorded(name: str, profile: str, values: Mapping[str, Any]) -> Recipe:
    """The recipe of this name with recorded values; keys that are new since have their defaults.

    Raises:
        RecipeError: when there is no such recipe, or this version cannot read the values.
    """
    plain = load_recipe(name, profile).model_dump(mode="json")
    described = {key: value for key, value in plain.items() if key in DESCRIBING}
    try:
        return Recipe.model_validate({**described, **values})
    except ValidationError as error:
        raise RecipeError(
            f"This version cannot read the values that a run has recorded ({error.errors()[0]['msg']})",
            where=f"{name}, profile {profile}",
            fix="run the stages again",
        ) from error
