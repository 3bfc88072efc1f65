"""The noise by which masked image modelling chooses the masked units, as in MAE (arXiv 2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitpipe.contracts.seeds import seed_of


def mask_noise(batch: int, num_units: int, *, seed: int, step: int, micro: int, rank: int) -> Tensor:
    """Uniform noise in [0, 1), (B, N) float32 on the CPU; the units with the smallest values stay visible.

    Args:
        batch: B, images of the micro-batch.
        num_units: N, units of 16 x 16 pixels per image.
        seed: of the run.
        step: optimiser step.
        micro: index of the micro-batch within the step on this rank.
        rank: of this process.
    """
    # A generator of its own, on the CPU: a resumed run draws the same masks, whatever drew before, and CPU
    # and GPU runs mask the same units.
    generator = torch.Generator().manual_seed(seed_of("mask", seed, step, micro, rank))
    return torch.rand(batch, num_units, generator=generator)
