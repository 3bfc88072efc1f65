"""A recipe's derived values, with the sizes of its datasets and networks."""

from __future__ import annotations

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import TRAIN_SET, Accelerator, Reason, resolve, train_plan
from vitpipe.datasets.catalogue import train_sizes
from vitpipe.models.registry import find_model

# The recipes' target machine: plan and listings describe it, not the laptop they are asked on.
_TARGET = Accelerator("cuda", has_bf16=True)


def accelerator_of(recipe: Recipe) -> Accelerator:
    """What the profile is meant to run on: the demo on a CPU, everything else on A100s."""
    return Accelerator() if recipe.data.source == "embedded" else _TARGET


def resolved_rows(recipe: Recipe, num_ranks: int) -> tuple[Reason, ...]:
    """Every derived value of a recipe with its reason."""
    model = find_model(recipe.model.name)
    return resolve(
        recipe,
        sizes=train_sizes(recipe.data),
        num_layers=model.num_layers,
        decay_stated_for=model.decay_stated_for,
        num_ranks=num_ranks,
        accelerator=accelerator_of(recipe),
    )


def training_steps(recipe: Recipe, num_ranks: int) -> dict[str, int]:
    """Optimiser steps of each training stage."""
    # From the catalogue, not from a prepared folder: `plan` answers before any data is there.
    sizes = train_sizes(recipe.data)
    steps: dict[str, int] = {}
    for stage, dataset in TRAIN_SET.items():
        section = getattr(recipe, stage)
        if section is not None and stage in recipe.stages:
            plan = train_plan(
                section,
                path=stage,
                num_images=sizes[dataset],
                num_ranks=num_ranks,
                accelerator=accelerator_of(recipe),
            )
            steps[stage] = plan.num_steps
    if recipe.segment is not None and "segment" in recipe.stages:
        steps["segment"] = recipe.segment.steps
    if recipe.detect is not None and "detect" in recipe.stages:
        # The rule of dense.plan.detect_plan, with the catalogue's size instead of the packed set's.
        steps["detect"] = round(recipe.detect.epochs * (sizes["coco"] // recipe.detect.global_batch))
    return steps
