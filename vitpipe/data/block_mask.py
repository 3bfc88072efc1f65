"""Masks of units in blocks: rectangles of random size, shape and place until enough is hidden.

BEiT: BERT Pre-Training of Image Transformers; Hangbo Bao et al.; arXiv 2106.08254, algorithm 1, with the
details of the released code, which iTPN's CLIP pre-training takes over.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

_TRIES = 10
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


class Draws(Protocol):
    """Where random numbers come from: the module `random`, or a generator of it."""

    def uniform(self, a: float, b: float) -> float:
        """A number between a and b, whichever is larger."""

    def randint(self, a: int, b: int) -> int:
        """An integer from a to b, both included."""


def block_mask(side: int, masked_units: int, smallest_block: int, draws: Draws) -> Tensor:
    """Float32 mask (side * side,): 1 at hidden units, at most `masked_units` of them.

    Fewer where ten rectangles in a row do not fit: of 75 units on a grid of 14 this is so for a third of the
    masks, which hide 74.5 on average.

    Args:
        side: units per side.
        masked_units: to hide.
        smallest_block: least area of a rectangle, in units; less where fewer are missing.
        draws: a mask takes a varying number of them.
    """
    mask, hidden = torch.zeros(side, side), 0
    while hidden < masked_units and (more := _add_block(mask, masked_units - hidden, smallest_block, draws)):
        hidden += more
    return mask.flatten()


def _add_block(mask_HW: Tensor, missing: int, smallest: int, draws: Draws) -> int:
    """Hide one rectangle; the number of units that are new, 0 when none of ten fitted."""
    side = len(mask_HW)
    for _ in range(_TRIES):
        area = draws.uniform(smallest, missing)
        aspect = math.exp(draws.uniform(*_LOG_ASPECT))
        down, across = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if down >= side or across >= side:
            continue
        top, left = draws.randint(0, side - down), draws.randint(0, side - across)
        block = mask_HW[top : top + down, left : left + across]
        new = block.numel() - int(block.sum())
        if 0 < new <= missing:
            block.fill_(1.0)
            return new
    return 0
