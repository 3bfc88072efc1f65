"""Whether each stage of a recipe is given a dataset of the kind that it reads."""

from __future__ import annotations

from vitpipe.config.recipe import Recipe
from vitpipe.config.section import Section
from vitpipe.config.set_names import sets_read
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.graph import CLASSES, PICTURES, all_stages
from vitpipe.datasets.catalogue import facts


def check_kinds(recipe: Recipe) -> None:
    """Compare the dataset of every stage with what the stage `reads`.

    Not done when the recipe is read: the kinds stand in the catalogue, whose files take a while to read.

    Raises:
        RecipeError: naming the first stage that cannot read its set.
        DatasetError: for a set that the embedded data lack.
    """
    for stage, dataset in sets_read(recipe).items():
        wanted, found = all_stages()[stage].reads, facts(dataset, recipe.data).kind
        section = getattr(recipe, stage)
        method = getattr(section, "method", None)
        if method is not None and method.needs_classes and found != CLASSES:
            raise RecipeError(
                f"Method '{method.name}' of stage '{stage}' reads {_words(CLASSES)}, but '{dataset}' is "
                f"{_words(found)}",
                where=f"{stage}.dataset",
                fix="name another dataset, or another method",
            )
        if wanted not in ("", PICTURES, found):
            what, where, fix = _mismatch(stage, section, dataset, found)
            raise RecipeError(f"Stage '{stage}' reads {_words(wanted)}, but {what}", where=where, fix=fix)


def _mismatch(stage: str, section: Section, dataset: str, found: str) -> tuple[str, str, str]:
    """What a stage is given instead of the kind that it reads, where this stands, and the fix."""
    is_key = "dataset" in type(section).model_fields
    if is_key and getattr(section, "dataset", None) is not None:
        fix = "name another dataset; `vitpipe datasets NAME` shows the kind of each"
        return f"'{dataset}' is {_words(found)}", f"{stage}.dataset", fix
    what = f"its weights were trained on '{dataset}', {_words(found)}"
    if is_key:
        fix = (
            "name a set with classes there, such as imagenet; `vitpipe datasets NAME` shows the kind of each"
        )
        return what, f"{stage}.dataset", fix
    return (
        what,
        f"start_from.{stage}",
        f"let it start from a stage that trains with classes, or leave '{stage}' out",
    )


def _words(kind: str) -> str:
    return "a set of images with classes" if kind == CLASSES else f"a set in the layout of {kind}"
