"""How long a task may take, from its planned steps.

    images of the stage x multiply-adds of one > hours on A100s at a careful utilisation > limit of one try

A limit ends a task that hangs; it must not end one that is merely slow. So it is a multiple of an estimate
that is already careful, and `stages.STAGE.timeout_hours` of the placement replaces it.
"""

from __future__ import annotations

import math
from typing import Any

from vitpipe.config.dense_sections import DetectConfig, SegmentConfig
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Resources, Stage
from vitpipe.stages.resolved import training_steps

# Forward and backward are three passes, and a multiply-add counts as two operations.
_OPERATIONS_PER_MULTIPLY_ADD = 6.0
# An A100 with bfloat16 (NVIDIA's data sheet), and what small kernels and loaders leave of it: published
# training of ViT-B reaches 0.3 to 0.45.
_A100_OPERATIONS, _UTILISATION = 312e12, 0.2
# Neck and heads of a detector or segmentor cost up to twice the backbone (tables of iTPN, PaCa and drloc).
_DENSE_FACTOR = 3.0
# Evaluation between epochs, starting, restarting from the last save.
_MARGIN, _START_HOURS = 4.0, 2.0
# What has no optimiser steps: packing 14 million images takes half a day on 16 cores, the others minutes.
_WITHOUT_STEPS_HOURS = {"prepare": 48.0}
_OTHERWISE_HOURS = 12.0


def expected_hours(stage: Stage, recipe: Recipe, resources: Resources, nodes: int = 1) -> float | None:
    """Hours of training on A100s; None for a stage without planned steps, or a set of unknown size.

    Args:
        resources: with the GPUs of each node.
    """
    num_gpus = max(1, resources.gpus * nodes)
    steps = training_steps(recipe, num_gpus).get(stage.name)
    section = getattr(recipe, stage.name, None)
    if not isinstance(steps, int) or section is None or resources.gpus == 0:
        return None
    per_image = _multiply_adds(section, recipe)
    operations = steps * section.global_batch * per_image * _OPERATIONS_PER_MULTIPLY_ADD
    return operations / (num_gpus * _A100_OPERATIONS * _UTILISATION) / 3600


def limit_hours(stage: Stage, recipe: Recipe, resources: Resources, nodes: int = 1) -> int:
    """Whole hours after which one try of a task is ended."""
    if recipe.data.source == "embedded":
        return 2  # minutes on two cores
    expected = expected_hours(stage, recipe, resources, nodes)
    if expected is None:
        return math.ceil(_WITHOUT_STEPS_HOURS.get(stage.name, _OTHERWISE_HOURS))
    return math.ceil(_START_HOURS + _MARGIN * expected)


def retry_window_seconds(timeout_seconds: int, retries: int, queueing_hours: float) -> int:
    """The time, from a task's first start, in which its failures are retried.

    kfp's `backoff_max_duration` is this window, not the longest pause (kubeflow/pipelines#14245): all tries
    and their waiting for a node must fit into it.
    """
    pauses = sum(BACKOFF_SECONDS * BACKOFF_FACTOR**n for n in range(retries))
    return math.ceil((retries + 1) * (timeout_seconds + queueing_hours * 3600) + pauses)


# Pauses between tries: 60 s, 120 s, 240 s, ...
BACKOFF_SECONDS, BACKOFF_FACTOR = 60, 2.0


def _multiply_adds(section: Any, recipe: Recipe) -> float:
    """Multiply-adds of one image of a training batch, forward; careful rather than exact."""
    entry = recipe.model.entry
    per_pixel = entry.classifier_macs / entry.image_size**2
    if isinstance(section, DetectConfig):
        width, height = section.test_size
        return per_pixel * width * height * _DENSE_FACTOR
    if isinstance(section, SegmentConfig):
        return per_pixel * section.crop_size**2 * _DENSE_FACTOR
    crops = getattr(getattr(section, "method", None), "crops", None)
    if crops is not None:  # the student sees all crops; the teacher the global ones, forward only
        pixels = 2 * (4 / 3) * crops.global_size**2 + crops.num_local * crops.local_size**2
        return float(per_pixel * pixels)
    return float(per_pixel * recipe.model.image_size**2)
