"""The noise from which masked image modelling chooses the hidden units (iTPN, section on masking)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitpipe.contracts.seeds import seed_of


def mask_noise(batch: int, num_units: int, *, seed: int, step: int, micro: int, rank: int) -> Tensor:
    """Uniform noise in [0, 1), (B, N) float32 on the CPU; the units with the smallest values stay visible.

    A pure function of its arguments: an interrupted run draws what an undisturbed one would.
    """
    generator = torch.Generator().manual_seed(seed_of("mask", seed, step, micro, rank))
    return torch.rand(batch, num_units, generator=generator)
