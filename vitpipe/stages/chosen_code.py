"""What a recipe chooses by name: modules that are imported by a text, and data files.

The imports of a stage's module show the rest (`config/code_identity.py`). A stage that imports something by a
name in the recipe has to be known here; `tests/config/test_code_identity.py` lists such imports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vitpipe.config.code_identity import Closure, closure_of
from vitpipe.config.model import find_model
from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import base_of, dataset_of
from vitpipe.contracts.discovery import source_of
from vitpipe.contracts.graph import Stage
from vitpipe.datasets.catalogue import facts

# Recipe key of a stage's section -> package and module of the one that it names.
_BY_NAME = {"method": ("vitpipe.methods", "method"), "head": ("vitpipe.dense.heads", "head")}
# Facts of a registry entry that describe the network to readers and to `plan`; the others it is built by.
_DESCRIBING = {"summary", "paper", "published_params", "classifier_params", "classifier_macs"}


def stage_closure(recipe: Recipe, stage: Stage) -> Closure:
    """All code that this recipe can reach in a stage."""
    return closure_of((stage.module, *_chosen_modules(recipe, stage)))


def chosen_data(recipe: Recipe, stage: Stage) -> dict[str, tuple[str, ...]]:
    """Which data files of a kind a stage of this recipe reads, see `code_identity.DATA_FILES`."""
    # The user's own sets have no file of facts, but may have the layout of a set that has.
    layouts = tuple(recipe.data.own_sets.get(name, name) for name in _datasets(recipe, stage))
    return {"paper": (recipe.source.paper,), "dataset": layouts}


def chosen_values(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Facts of the recipe's network that stand outside the recipe, for stages that have one."""
    # By value, as the recipe itself: another network that is added beside it changes nothing.
    if "model" not in stage.sections:
        return {}
    entry = dataclasses.asdict(find_model(recipe.model.name))
    return {name: str(value) for name, value in entry.items() if name not in _DESCRIBING}


def _datasets(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """The sets that a stage reads; prepare and the report go over all sets of the recipe."""
    read = dataset_of(recipe, stage.name)
    return tuple(name for name in (read, base_of(read)) if name) if read else recipe.data.names


def _readers(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """The modules that read the user's files, and those that verify prepared sets with annotations."""
    for name in _datasets(recipe, stage):
        known = facts(name, recipe.data)
        if not known.has_classes:
            yield f"vitpipe.datasets.layouts.{known.kind}"
        elif "data" in stage.sections:
            yield from (f"vitpipe.datasets.sources.{reader}" for reader in known.reader)


def _chosen_modules(recipe: Recipe, stage: Stage) -> Iterator[str]:
    if "model" in stage.sections:
        yield f"vitpipe.models.{find_model(recipe.model.name).family}.family"
    section = getattr(recipe, stage.name, None)
    for key, (package, module) in _BY_NAME.items():
        chosen = getattr(section, key, None)
        # A name, or a section that has one.
        name = chosen if isinstance(chosen, str) else getattr(chosen, "name", "")
        chosen_module = f"{package}.{name}.{module}"
        # A choice between parts of one module is seen by the imports.
        if name and source_of(chosen_module) is not None:
            yield chosen_module
    if "data" in (*stage.inputs, *stage.sections):
        yield from _readers(recipe, stage)
