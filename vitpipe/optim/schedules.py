"""Learning rate as a pure function of the step, so that there is no scheduler state to save and resume."""

from __future__ import annotations

import math


def learning_rate(
    step: float, *, num_steps: float, warmup_steps: float, peak_lr: float, min_lr: float
) -> float:
    """Linear warm-up from 0 to `peak_lr`, then half a cosine down to `min_lr`.

    MAE (arXiv 2111.06377) and iTPN (arXiv 2211.12735) update it at every iteration, in fractional
    epochs; `step`, `num_steps` and `warmup_steps` may be in any one unit. The first step of a run with
    warm-up has learning rate 0, as theirs has.

    Args:
        step: steps already done, fractions allowed, 0 ... `num_steps`.
        num_steps: length of the run, warm-up included.
        warmup_steps: length of the warm-up.
        peak_lr: absolute, reached at the end of the warm-up.
        min_lr: absolute, reached at the end of the run.
    """
    # Also excludes division by 0 for a run without warm-up.
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    # A run that is all warm-up has no cosine part, whose length would be 0.
    if num_steps <= warmup_steps:
        return peak_lr
    # At most 1: beyond the end the cosine would rise again.
    progress = min(1.0, (step - warmup_steps) / (num_steps - warmup_steps))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
