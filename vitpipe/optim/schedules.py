"""Schedules as pure functions of the step, so that there is no scheduler state to save and resume.

`learning_rate` and `weight_decay` follow the recipe; the curves below serve the methods' own schedules, too:

    momentum of a teacher           cosine(moment.progress, 0.996, 1.0)          DINO, MoBY
    temperature of a teacher        ramp(moment.epoch, 30, 0.04, 0.07)           DINO
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitpipe.config.resolve import TrainPlan
from vitpipe.config.train_sections import OptimConfig


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at 1, and constant afterwards."""
    # At most 1: beyond the end the cosine would rise again.
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def poly(progress: float, start: float, end: float, power: float = 1.0) -> float:
    """From `start` to `end` by (1 - progress) ** power; linear for power 1."""
    return end + (start - end) * max(0.0, 1.0 - progress) ** power


def dropped(step: float, drops: Sequence[float], factor: float) -> float:
    """1, times `factor` from each of the drops on."""
    return float(factor ** sum(step >= drop for drop in drops))


def ramp(position: int, length: int, start: float, end: float) -> float:
    """Evenly spaced from `start` at position 0 to `end` at `length - 1`, and constant afterwards."""
    if position >= length - 1:
        return end
    return start + (end - start) * position / (length - 1)


def warm_up(step: float, warmup_steps: float, start: float) -> float:
    """A factor that rises linearly from `start` in step 0 to 1 in step `warmup_steps`, and stays there."""
    if step >= warmup_steps:
        return 1.0
    return 1.0 - (1.0 - step / warmup_steps) * (1.0 - start)


def learning_rate(step: float, plan: TrainPlan, optim: OptimConfig) -> float:
    """The absolute learning rate of a step: linear warm-up, then the recipe's curve to `min_lr`.

    By default as in MAE (arXiv 2111.06377) and iTPN (arXiv 2211.12735): it changes in every step, begins at
    0, and half a cosine starts after the warm-up.

    Args:
        step: optimiser steps done before, 0 ... `plan.num_steps`; may be a fraction.
    """
    if optim.schedule_unit == "epoch":
        step -= step % plan.steps_per_epoch
    if optim.warmup_factor is not None:
        return _curve(step, plan, optim) * warm_up(step, plan.warmup_steps, optim.warmup_factor)
    if step < plan.warmup_steps:
        # DINO's warm-up has the peak in its last step already, MAE's in the step after it.
        length = max(1, plan.warmup_steps - 1) if optim.warmup_reaches_peak else plan.warmup_steps
        return plan.warmup_lr + (plan.peak_lr - plan.warmup_lr) * step / length
    return _curve(step, plan, optim)


def _curve(step: float, plan: TrainPlan, optim: OptimConfig) -> float:
    # Swin's curve counts from the start of the run (its warm-up only replaces the beginning).
    first = 0 if optim.schedule_start == "run" else plan.warmup_steps
    # A run that is all warm-up has no curve, whose length would be 0.
    progress = max(0.0, (step - first) / (plan.num_steps - first)) if plan.num_steps > first else 0.0
    if optim.schedule == "cosine":
        return cosine(progress, plan.peak_lr, plan.min_lr)
    if optim.schedule == "poly":
        return poly(progress, plan.peak_lr, plan.min_lr, optim.poly_power)
    if optim.schedule == "step":
        # Rounded: an epoch's end that is a fraction belongs to the nearest step.
        drops = [round(epoch * plan.steps_per_epoch) for epoch in optim.drop_epochs]
        return max(plan.min_lr, plan.peak_lr * dropped(step, drops, optim.drop_factor))
    return plan.peak_lr


def weight_decay(step: int, plan: TrainPlan, optim: OptimConfig) -> float:
    """The weight decay of a step: constant, or a cosine over the run to `final_weight_decay` (DINO)."""
    if optim.final_weight_decay is None:
        return optim.weight_decay
    return cosine(step / plan.num_steps, optim.weight_decay, optim.final_weight_decay)
