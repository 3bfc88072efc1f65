"""Every derived value of a recipe, resolved in this one place, each with its reason.

Nothing here needs torch or data: sizes and the machine are arguments, so `vitpipe recipe` and
`vitpipe plan` answer at once and training uses the very same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitpipe.config.data import DataConfig
from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import sets_read
from vitpipe.config.train_sections import LoopConfig, OptimConfig, TrainConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.units import counted

Precision = Literal["off", "bf16", "fp16"]
# Images per micro-batch on a CPU, for all stages.
_MOST_PER_CPU = 64
_SMALL_NETWORK = 5_000_000  # parameters; see num_threads
# In the place of a number that follows from a set whose images have not been counted.
UNKNOWN = "unknown until prepared"


@dataclass(frozen=True)
class Accelerator:
    """What a rank runs on."""

    kind: Literal["cpu", "cuda"] = "cpu"
    has_bf16: bool = False


@dataclass(frozen=True)
class Reason:
    """One derived value: where it belongs, what it is, why."""

    path: str
    value: float | int | str
    why: str


@dataclass(frozen=True)
class TrainPlan:
    """The numbers a training run follows. Steps are optimiser steps; learning rates are absolute."""

    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    warmup_lr: float
    global_batch: int
    micro_batch: int
    accumulation: int
    num_ranks: int
    precision: Precision
    reasons: tuple[Reason, ...]


def train_plan(
    section: LoopConfig, *, path: str, num_images: int, num_ranks: int, accelerator: Accelerator
) -> TrainPlan:
    """Derive steps, learning rate, accumulation and precision for one training stage.

    Args:
        path: the section's name in the recipe, for the reasons.
        num_images: size of the training set.
        num_ranks: processes that share each global batch.

    Raises:
        RecipeError: when the batch cannot be shared by the ranks, the set is smaller than one batch, or the
            GPU lacks the precision.
    """
    batch = section.global_batch
    if batch % num_ranks:
        raise RecipeError(
            f"The global batch of {counted(batch, 'image')} cannot be shared by {num_ranks} ranks",
            where=f"{path}.global_batch",
            fix=f"use a number of GPUs that divides {batch}",
        )
    if num_images < batch:
        raise RecipeError(
            f"The training set has {counted(num_images, 'image')}, fewer than one global batch of {batch}",
            where=f"{path}.global_batch",
            fix="lower the global batch or give more images",
        )
    # The rest of an epoch is dropped, as the published loaders do (drop_last).
    steps_per_epoch = num_images // batch
    num_steps, steps_why = section.length(steps_per_epoch)
    warmup_steps, warmup_why = _warmup(section, num_steps, steps_per_epoch)
    factor, factor_why = _lr_factor(section)
    optim = section.optim
    others = factor if optim.scale_all_rates else 1.0
    peak_lr, lr_why = optim.base_lr * factor, f"{optim.base_lr:g} x {factor_why}"
    micro_batch, micro_why = _micro_batch(section, path, num_ranks, accelerator)
    accumulation = batch // (micro_batch * num_ranks)
    precision, precision_why = _precision(section, path, accelerator)
    reasons = (
        Reason(
            f"{path}.steps_per_epoch",
            steps_per_epoch,
            f"{num_images} images // global batch {batch}, rest dropped",
        ),
        Reason(f"{path}.num_steps", num_steps, steps_why),
        Reason(f"{path}.warmup_steps", warmup_steps, warmup_why),
        Reason(f"{path}.peak_lr", peak_lr, lr_why),
        *_other_rates(path, optim, others, factor_why),
        Reason(f"{path}.micro_batch", micro_batch, micro_why),
        Reason(
            f"{path}.accumulation", accumulation, f"{batch} / ({micro_batch} per rank x {num_ranks} ranks)"
        ),
        Reason(f"{path}.precision", precision, precision_why),
    )
    return TrainPlan(
        steps_per_epoch, num_steps, warmup_steps, peak_lr, optim.min_lr * others, optim.warmup_lr * others,
        batch, micro_batch, accumulation, num_ranks, precision, reasons,
    )  # fmt: skip


def layer_scales(layer_decay: float, num_layers: int, stated_for: int | None) -> tuple[float, ...]:
    """Learning-rate factor of each layer id 0 .. num_layers - 1: one for the last, decayed towards the first.

    Args:
        stated_for: steps from the first layer to the last that the published decay was stated for, if it is
            to be spread over this network (iTPN's code: 13, those of a 12-block network), else `None`.
    """
    # The exponent spreads the published decay over the steps of this network: with its own number of steps
    # a deep, thin network would freeze its first layers (0.65 ** 31 is 1.6e-6).
    last = num_layers - 1
    factor = layer_decay ** (stated_for / last) if stated_for else layer_decay
    return tuple(factor ** (last - layer) for layer in range(num_layers))


def num_workers(data: DataConfig) -> int:
    """Loader processes per rank: `auto` is the cores that are left per rank, at most 8.

    On two cores or fewer the training process itself decodes: a worker would only take its core.
    """
    if data.workers != "auto":
        return data.workers
    # The affinity mask, not os.cpu_count(): it follows taskset and cpusets. torchrun sets the variable.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if cores <= 2 else min(8, cores - 1)


def num_packers(data: DataConfig) -> int:
    """Processes that examine images while packing: all cores unless the recipe says how many.

    None for embedded data, which is packed before a process would have started.
    """
    if data.source == "embedded":
        return 0
    return len(os.sched_getaffinity(0)) if data.workers == "auto" else data.workers


def num_threads(num_params: int) -> int | None:
    """Threads of torch on a CPU: one for a network under 5 million parameters, else torch's own choice.

    Measured on two cores with networks of half a million: waking a second thread for each small operator took
    longer than its work, a training step was 1.1 to 1.5 times slower.
    """
    return 1 if num_params < _SMALL_NETWORK else None


def resolve(
    recipe: Recipe,
    *,
    sizes: Mapping[str, int],
    num_layers: int,
    decay_stated_for: int | None,
    num_ranks: int,
    accelerator: Accelerator,
) -> tuple[Reason, ...]:
    """All derived values of all training stages, and the layer-decay tables.

    Args:
        sizes: dataset name -> number of training images; without those whose images are not counted yet.
        num_layers: layer ids of the recipe's classifier.
        decay_stated_for: see `layer_scales`.

    Raises:
        RecipeError: as `train_plan`.
    """
    reasons: list[Reason] = []
    for stage, dataset in sets_read(recipe).items():
        section = getattr(recipe, stage)
        # A stage such as the probe may train in a part of its section.
        parts = (section, *(getattr(section, name) for name in type(section).model_fields))
        section = next((part for part in parts if isinstance(part, LoopConfig)), None)
        if section is None:
            continue
        if dataset not in sizes:
            reasons.append(
                Reason(f"{stage}.num_steps", UNKNOWN, f"the images of '{dataset}' are not counted")
            )
            continue
        if section.global_batch % num_ranks and not isinstance(section, TrainConfig):
            # Detection and segmentation have small batches: they run on fewer GPUs than pre-training.
            why = f"{num_ranks} ranks cannot share its global batch of {section.global_batch}"
            reasons.append(Reason(f"{stage}.accumulation", "not on so many ranks", why))
            continue
        num_images = section.num_images(sizes[dataset])
        plan = train_plan(
            section, path=stage, num_images=num_images, num_ranks=num_ranks, accelerator=accelerator
        )
        reasons += plan.reasons
        # Dense stages have another network, whose layers are counted when it is built.
        if section.optim.layer_decay is not None and isinstance(section, TrainConfig):
            scales = layer_scales(section.optim.layer_decay, num_layers, decay_stated_for)
            reasons += _layer_reasons(stage, section.optim.layer_decay, scales, plan.peak_lr)
    reasons.append(Reason("data.workers", num_workers(recipe.data), "cores left per rank, at most 8"))
    return tuple(reasons)


def _layer_reasons(stage: str, decay: float, scales: tuple[float, ...], peak_lr: float) -> list[Reason]:
    last = len(scales) - 1
    names = {0: "input and positions", last: "head"}
    return [
        Reason(
            f"{stage}.layer_lr.{layer}",
            peak_lr * scale,
            f"{names.get(layer, f'layer {layer}')}: x {scale:.4f} "
            f"({decay:g}, {scales[-2] / scales[-1]:.4f} per layer)",
        )
        for layer, scale in enumerate(scales)
    ]


def _warmup(section: LoopConfig, num_steps: int, steps_per_epoch: int) -> tuple[int, str]:
    optim = section.optim
    if optim.warmup_steps is not None:
        # Not shortened to the run: the rate is as low in these steps as it is published for them.
        return optim.warmup_steps, "as the recipe says"
    steps = round(optim.warmup_epochs * steps_per_epoch)
    why = f"{optim.warmup_epochs:g} epochs x {steps_per_epoch} steps"
    return (steps, why) if steps <= num_steps else (num_steps, f"{why}, cut to the length of the run")


def _other_rates(path: str, optim: OptimConfig, factor: float, why: str) -> list[Reason]:
    """The rates where the schedule begins and ends, where they follow from the batch as the peak does."""
    if not optim.scale_all_rates:
        return []
    stated = {"min_lr": optim.min_lr, "warmup_lr": optim.warmup_lr}
    return [Reason(f"{path}.{name}", lr * factor, f"{lr:g} x {why}") for name, lr in stated.items()]


def _lr_factor(section: LoopConfig) -> tuple[float, str]:
    optim = section.optim
    if optim.lr_factor is not None:
        return optim.lr_factor, f"{optim.lr_factor:g}, the factor of the recipe"
    if optim.lr_reference_batch is None:
        return 1.0, "1: the recipe gives no reference batch"
    factor = section.global_batch / optim.lr_reference_batch
    return factor, f"{section.global_batch} / {optim.lr_reference_batch}"


def _micro_batch(section: LoopConfig, path: str, num_ranks: int, accelerator: Accelerator) -> tuple[int, str]:
    share = section.global_batch // num_ranks
    if section.micro_batch == "auto":
        # A divisor, so that every micro-batch has the same size and gradients average without weights.
        most = _MOST_PER_CPU if accelerator.kind == "cpu" else section.most_per_gpu
        micro = max(d for d in range(1, min(share, most) + 1) if share % d == 0)
        return micro, f"largest divisor of {share} per rank that is at most {most}"
    if share % section.micro_batch:
        raise RecipeError(
            f"The micro-batch of {section.micro_batch} does not divide the {share} images per rank",
            where=f"{path}.micro_batch",
            fix='give a divisor, or "auto"',
        )
    return section.micro_batch, "as the recipe says"


def _precision(section: LoopConfig, path: str, accelerator: Accelerator) -> tuple[Precision, str]:
    if section.precision == "bf16" and accelerator.kind == "cuda" and not accelerator.has_bf16:
        raise RecipeError(
            "This GPU has no bfloat16",
            where=f"{path}.precision",
            fix="use fp16, or auto, which takes what the GPU has",
        )

    if section.precision != "auto":
        return section.precision, "as the recipe says"
    if accelerator.kind == "cpu":
        return "off", "a CPU: float32 is faster there and exact"
    if accelerator.has_bf16:
        return "bf16", "the GPU has bfloat16, which needs no loss scaling"
    return "fp16", "the GPU lacks bfloat16"
