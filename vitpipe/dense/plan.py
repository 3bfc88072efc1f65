"""The plan of a dense training run: steps, batch shares and learning rate, as pure functions.

Sizes and schedules of iTPN's dense transfers (arXiv 2211.12735) are those of the authors' released
configurations, whose learning rates are absolute: they are not scaled by the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vitpipe.config.recipe import DenseConfig, DetectConfig, SegmentConfig
from vitpipe.config.resolve import Accelerator, Precision, check_precision
from vitpipe.contracts.errors import RecipeError

# Images per GPU in iTPN's released launch lines; larger shares of the global batch are accumulated.
_GPU_MICRO_BATCH = 2
_DROP_FACTOR = 0.1
# Fractions of the base learning rate at step 0 in iTPN's released configurations.
_DETECT_WARMUP_START = 1e-3
_SEGMENT_WARMUP_START = 1e-6


@dataclass(frozen=True)
class DensePlan:
    """Number and size of optimiser steps; `lr_factor` maps a step to its factor on the base learning rate.

    Each step takes `accumulation` micro-batches of `micro_batch` images on each of `num_ranks` ranks.
    `norm` is the type of batch norm in the heads; `notes` are lines for the log that explain the values.
    """

    num_steps: int
    global_batch: int
    micro_batch: int
    accumulation: int
    num_ranks: int
    precision: Precision
    norm: str
    lr_factor: Callable[[int], float]
    notes: tuple[str, ...]


def detect_plan(
    detect: DetectConfig, *, num_images: int, num_ranks: int, accelerator: Accelerator
) -> DensePlan:
    """Plan the training on COCO in epochs of whole global batches; the remainder of an epoch is dropped.

    Args:
        num_images: training images with at least one object.

    Raises:
        RecipeError: when there are fewer images than one global batch, or the ranks cannot share it.
    """
    steps_per_epoch = num_images // detect.global_batch
    if steps_per_epoch == 0:
        raise RecipeError(
            f"The training set has {num_images} images with objects, fewer than one global batch of "
            f"{detect.global_batch}",
            where="detect.global_batch",
            fix="lower the global batch or use more images",
        )
    num_steps = max(1, round(detect.epochs * steps_per_epoch))
    # Rounded: the drops of ViTDet's schedule are fractions of an epoch (8/9 and 26/27 of the run).
    drops = tuple(round(epoch * steps_per_epoch) for epoch in detect.lr_drop_epochs)
    factor = partial(drop_factor, warmup_steps=detect.optim.warmup_steps, drop_steps=drops)
    notes = (
        f"{num_steps} steps: {detect.epochs:g} epochs x {num_images} images // batch {detect.global_batch}",
        f"learning rate x {_DROP_FACTOR:g} after steps {', '.join(map(str, drops)) or 'none'}",
    )
    return _shared(detect, "detect", num_steps, factor, notes, num_ranks, accelerator)


def segment_plan(segment: SegmentConfig, *, num_ranks: int, accelerator: Accelerator) -> DensePlan:
    """Plan the training on ADE20K, whose length the recipe gives in steps.

    Raises:
        RecipeError: when the ranks cannot share the global batch, or a rank's share is too small.
    """
    factor = partial(poly_factor, warmup_steps=segment.optim.warmup_steps, num_steps=segment.steps)
    notes = (f"{segment.steps} steps of {segment.global_batch} images",)
    plan = _shared(segment, "segment", segment.steps, factor, notes, num_ranks, accelerator)
    # UPerNet's pooling pyramid has a branch of 1 x 1 maps, where one image gives one value per channel:
    # torch's batch norm raises "Expected more than 1 value per channel when training".
    if segment.head == "upernet" and plan.micro_batch == 1 and plan.norm == "BN":
        raise RecipeError(
            "Batch norm in the segmentation head needs at least two images on each rank",
            where="segment.global_batch",
            fix=f"use an even number of images per rank: a global batch that {2 * num_ranks} divides",
        )
    return plan


def drop_factor(step: int, *, warmup_steps: int, drop_steps: tuple[int, ...]) -> float:
    """Linear warm-up from 0.001; times 0.1 from each of `drop_steps` on (iTPN on COCO)."""
    regular = _DROP_FACTOR ** sum(step >= drop for drop in drop_steps)
    return regular * _warmup(step, warmup_steps, _DETECT_WARMUP_START)


def poly_factor(step: int, *, warmup_steps: int, num_steps: int) -> float:
    """Linear decay from 1 to 0 over the whole run, times a linear warm-up from 1e-6 (iTPN on ADE20K)."""
    return (1.0 - step / num_steps) * _warmup(step, warmup_steps, _SEGMENT_WARMUP_START)


def _warmup(step: int, warmup_steps: int, start: float) -> float:
    if step >= warmup_steps:
        return 1.0
    return 1.0 - (1.0 - step / warmup_steps) * (1.0 - start)


def _shared(
    dense: DenseConfig,
    path: str,
    num_steps: int,
    lr_factor: Callable[[int], float],
    notes: tuple[str, ...],
    num_ranks: int,
    accelerator: Accelerator,
) -> DensePlan:
    if dense.global_batch % num_ranks:
        raise RecipeError(
            f"The global batch of {dense.global_batch} images cannot be shared by {num_ranks} ranks",
            where=f"{path}.global_batch",
            fix=f"use a number of GPUs that divides {dense.global_batch}",
        )
    check_precision(dense.precision, path, accelerator)
    share = dense.global_batch // num_ranks
    micro = share if accelerator.kind == "cpu" else _divisor(share, _GPU_MICRO_BATCH)
    # torch's SyncBatchNorm has no CPU kernel; on a single rank it equals plain batch norm.
    synchronised = num_ranks > 1 and accelerator.kind == "cuda"
    notes = (
        *notes,
        f"{share // micro} micro-batch(es) of {micro} images per rank and step, {num_ranks} rank(s)",
        f"batch norm in the heads over {'all ranks' if synchronised else 'one rank'} "
        f"({micro * num_ranks if synchronised else micro} images)",
    )
    return DensePlan(
        num_steps=num_steps,
        global_batch=dense.global_batch,
        micro_batch=micro,
        accumulation=share // micro,
        num_ranks=num_ranks,
        precision=_precision(dense, accelerator),
        norm="SyncBN" if synchronised else "BN",
        lr_factor=lr_factor,
        notes=notes,
    )


def _divisor(share: int, limit: int) -> int:
    """The largest divisor of `share` up to `limit`: every micro-batch has the same size."""
    return max(d for d in range(1, min(share, limit) + 1) if share % d == 0)


def _precision(dense: DenseConfig, accelerator: Accelerator) -> Precision:
    if dense.precision != "auto":
        return dense.precision
    if accelerator.kind == "cpu":
        return "off"
    return "bf16" if accelerator.has_bf16 else "fp16"
