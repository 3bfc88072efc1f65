"""Names of datasets: which there are, and which of them the stages of a recipe read.

A catalogue set is a file `datasets/facts/<name>.yaml`, ours or a plugin's; a set of the user's own stands in
`data.own_sets`. A stage reads the set that `dataset` of its section names; one without that key (evaluate),
or without a value for it (probe), reads the set that its weights were trained on.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from vitpipe.contracts.discovery import files_in
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import CLASSES, graph_of
from vitpipe.contracts.spelling import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vitpipe.config.recipe import Recipe

FACTS_FOLDER = "datasets/facts"
_OF_CHECKPOINTS = "imagenet"  # measures a checkpoint whose stage names no other set


def facts_files() -> dict[str, Path]:
    """The file of every catalogue set by name, sorted by name."""
    return dict(_by_name(files_in(FACTS_FOLDER, "*.yaml")))


@functools.lru_cache(maxsize=8)  # asked for by each name of a set that a recipe holds
def _by_name(files: tuple[Path, ...]) -> dict[str, Path]:
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def check_set_name(name: str, own: Iterable[str] = ()) -> None:
    """Check that a set is in the catalogue or the user's own.

    Raises:
        ValueError: with the closest name.
    """
    known = (*facts_files(), *own)
    if name not in known:
        meant = did_you_mean(name, known)
        raise ValueError(
            f"there is no dataset '{name}'{meant} (`vitpipe datasets` lists them; data.own_sets names yours)"
        )


def check_own_sets(own: Mapping[str, str]) -> None:
    """Check the names of the user's own sets, and the layouts that they say they have.

    Raises:
        ValueError: for a name that cannot be a folder or is taken, or an unknown layout.
    """
    for name, layout in own.items():
        # The name becomes a folder of the prepared data and a column's value.
        if not name.isidentifier():
            raise ValueError(f"'{name}' cannot name a set: use letters, digits and _ only")
        if name in facts_files():
            raise ValueError(f"'{name}' is in the catalogue; give your set another name, and its folder, too")
        if layout != CLASSES:
            check_set_name(layout)


@functools.cache
def _classes_of(path: Path) -> str | None:
    # Only when it is asked: validating a recipe needs names alone, which are those of the files.
    import yaml

    from vitpipe.contracts.safe_yaml import SAFE_LOADER

    found = yaml.load(read_text(path), Loader=SAFE_LOADER).get("classes_of")
    return None if found is None else str(found)


def base_of(name: str) -> str | None:
    """The set of which this one is some classes, such as imagenet of imagenet100; None for a whole set."""
    path = facts_files().get(name)
    return _classes_of(path) if path else None


def dataset_of(recipe: Recipe, stage: str) -> str | None:
    """The dataset that a stage reads by the recipe; None for one that reads none, such as `report`.

    With weights from outside the recipe, probe and evaluate read the set that the weights' card names.
    """
    named: str | None = getattr(getattr(recipe, stage, None), "dataset", None)
    if named is not None:
        return named
    node = next((n for n in graph_of(recipe.stages, recipe.start_from) if n.name == stage), None)
    if node is None or "data" not in node.stage.inputs:
        return None
    section = getattr(recipe, stage, None)
    if getattr(section, "weights", None) is not None:
        return _OF_CHECKPOINTS
    feeder = node.inputs.get("weights")
    return dataset_of(recipe, feeder) if feeder else None


def sets_read(recipe: Recipe) -> dict[str, str]:
    """Stage -> dataset of every stage of the recipe that reads one, in running order."""
    found = {node.name: dataset_of(recipe, node.name) for node in graph_of(recipe.stages, recipe.start_from)}
    return {stage: name for stage, name in found.items() if name is not None}


def sets_to_prepare(recipe: Recipe) -> tuple[str, ...]:
    """What `data.sets` stands for: the list itself, or for `auto` every set that a stage reads.

    A set that is some classes of another one follows that one, from whose shards it is read.

    Raises:
        ValueError: a stage reads an unknown set, or one that the list lacks.
    """
    read = sets_read(recipe)
    for stage, name in read.items():
        try:
            check_set_name(name, recipe.data.own_sets)
        except ValueError as error:
            raise ValueError(f"'{stage}.dataset': {error}") from error
        listed = recipe.data.sets
        if listed != "auto" and name not in listed and base_of(name) not in listed:
            raise ValueError(
                f"stage '{stage}' reads '{name}', which is not among data.sets ({', '.join(listed)}): add it "
                "there, or set data.sets to auto"
            )
    if recipe.data.sets != "auto":
        return tuple(dict.fromkeys((*recipe.data.sets, *read.values())))
    if not read:
        # With `stages=[prepare]` somebody prepares now what the recipe's stages read later. Sections that it
        # does not write are those of stages that it does not have.
        written = (name for name in type(recipe).model_fields if name in recipe.model_fields_set)
        sections = ((name, getattr(recipe, name)) for name in written)
        read = {name: part.dataset for name, part in sections if getattr(part, "dataset", None)}
    return tuple(dict.fromkeys(n for name in read.values() for n in (base_of(name), name) if n is not None))
