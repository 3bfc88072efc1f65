"""A recipe's derived values, with the sizes of its datasets and networks."""

from __future__ import annotations

from collections.abc import Mapping

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import UNKNOWN, Accelerator, Reason, resolve, train_plan
from vitpipe.config.set_names import sets_read
from vitpipe.config.train_sections import LoopConfig, TrainConfig
from vitpipe.datasets.set_sizes import train_sizes
from vitpipe.datasets.stage_kinds import check_kinds

# The recipes' target machine: plan and listings describe it, not the laptop they are asked on.
_TARGET = Accelerator("cuda", has_bf16=True)


def accelerator_of(recipe: Recipe) -> Accelerator:
    """What the profile is meant to run on: the demo on a CPU, everything else on A100s."""
    return Accelerator() if recipe.data.source == "embedded" else _TARGET


def resolved_rows(recipe: Recipe, num_ranks: int) -> tuple[Reason, ...]:
    """Every derived value of a recipe with its reason.

    Raises:
        RecipeError: as `config.resolve.resolve`, or a stage cannot read its dataset.
    """
    check_kinds(recipe)
    return resolve(
        recipe,
        sizes=train_sizes(recipe.data, sets_read(recipe).values()),
        num_layers=recipe.model.num_layers,
        decay_stated_for=recipe.model.entry.decay_stated_for,
        num_ranks=num_ranks,
        accelerator=accelerator_of(recipe),
    )


def training_steps(
    recipe: Recipe, num_ranks: int, prepared: Mapping[str, int] | None = None
) -> dict[str, int | str]:
    """Optimiser steps of each training stage; a text where the images of its set are not counted yet.

    Args:
        prepared: training images of the sets that are prepared; the others are counted or looked up.
    """
    check_kinds(recipe)
    read = sets_read(recipe)
    sizes = {**train_sizes(recipe.data, read.values()), **(prepared or {})}
    steps: dict[str, int | str] = {}
    for stage, dataset in read.items():
        section = getattr(recipe, stage)
        if not isinstance(section, LoopConfig):
            continue
        if dataset not in sizes:
            steps[stage] = UNKNOWN
        else:
            # Detection and segmentation have small batches and run on fewer ranks, see `resolve`.
            shared = isinstance(section, TrainConfig) or section.global_batch % num_ranks == 0
            plan = train_plan(
                section,
                path=stage,
                num_images=section.num_images(sizes[dataset]),
                num_ranks=num_ranks if shared else 1,
                accelerator=accelerator_of(recipe),
            )
            steps[stage] = plan.num_steps
    return steps
