"""The name of a run: its recipe, profile and seed, and what was set otherwise than in the recipe's file."""

from __future__ import annotations

from typing import Any

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.config.telling_values import flat_values, short_digest, short_text, telling_order, value_text
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.graph import all_stages

# Descriptions and expected values, not parameters of the run.
DESCRIBED = ("summary", "source", "expect", "discrepancies", "report")
_IN_FRONT = ("name", "profile", "seed")  # every name has them
_NAMED = 3  # differences that a name spells out; more do not fit MLflow's column


def run_title(recipe: Recipe) -> str:
    """`itpn/pixel_base (demo, seed 3, finetune.epochs=5)`; other values give another name.

    The most telling overrides are spelt out. Where one is left out or shortened, a digest of all of them
    follows: `(..., finetune.epochs=5, model.name=x, data.near_duplicates=true, 2 more #0f3a9c21)`.
    """
    parts = [recipe.profile, f"seed {recipe.seed}"]
    written = _written(recipe)
    if written is None:
        # A container has the values from a package, not the file: which of them are overrides is not known.
        values = flat_values(_without_front(sections_in_use(recipe)))
        parts.append(f"values #{short_digest({key: value_text(value) for key, value in values.items()})}")
    else:
        changed = overridden(recipe)
        named = list(changed)[:_NAMED]
        parts += [f"{key}={short_text(changed[key])}" for key in named]
        if len(changed) > len(named) or any(short_text(changed[k]) != value_text(changed[k]) for k in named):
            more = f"{len(changed) - len(named)} more " if len(changed) > len(named) else ""
            digest = short_digest({key: value_text(value) for key, value in changed.items()})
            parts.append(f"{more}#{digest}")
    return f"{recipe.name} ({', '.join(parts)})"


def overridden(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of what differs from the recipe as it is written, the most telling first.

    The seed is not among them, nor what belongs to a stage that the run does not have. Empty where the
    recipe's file is not here, as in a container that got its values from a package.
    """
    written = _written(recipe)
    if written is None:
        return {}
    values = _without_front(sections_in_use(recipe))
    ours, theirs = flat_values(values), flat_values(_without_front(sections_in_use(written)))
    absent = object()
    changed = {key: value for key, value in ours.items() if value != theirs.get(key, absent)}
    for key in (key for key in theirs if key not in ours):
        section, _, rest = key.partition(".")
        # Of a stage that the run does not have, or of data that it does not read, nothing is overridden.
        is_read = section in values and (section != "data" or rest.partition(".")[0] in values["data"])
        # An empty mapping is a value of its own, and is none where it has got entries.
        if is_read and not any(other.startswith(f"{key}.") for other in ours):
            changed[key] = None
    deciding = flat_values(recipe.acting(on_weights_only=True))
    return {key: changed[key] for key in telling_order(changed, deciding)}


def sections_in_use(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values without those that this run does not read.

    Left out are the sections of stages that the recipe does not have, and of `data` what belongs to another
    source than the run's.
    """
    values = recipe.model_dump(mode="json")
    absent = {name for name in all_stages() if name not in recipe.stages}
    kept = {key: value for key, value in values.items() if key not in {*DESCRIBED, *absent}}
    other_sources = {"embedded": "embedded", "pinned": "pinned", "root": "folders", "own_sets": "folders"}
    kept["data"] = {
        key: value
        for key, value in values["data"].items()
        if other_sources.get(key, recipe.data.source) == recipe.data.source
    }
    return kept


def _written(recipe: Recipe) -> Recipe | None:
    """The recipe as its file says it; None where the file is not here."""
    try:
        return load_recipe(recipe.name, recipe.profile)
    except RecipeError:
        return None


def _without_front(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _IN_FRONT}
