"""Whether each stage of a recipe is given a dataset of the kind that it reads."""

from __future__ import annotations

from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import sets_read
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.graph import CLASSES, all_stages
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
        if wanted not in ("", found):
            raise RecipeError(
                f"Stage '{stage}' reads {_words(wanted)}, but '{dataset}' is {_words(found)}",
                where=f"{stage}.dataset",
                fix="name another dataset; `vitpipe datasets NAME` shows the kind of each",
            )


def _words(kind: str) -> str:
    return "a set of images with classes" if kind == CLASSES else f"a set in the layout of {kind}"
