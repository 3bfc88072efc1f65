"""How a network of reversible columns remembers: the mode asked for, or a safer one.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005. The modes are those of `reversible.run_chain`.

How exact a rebuilt gradient is. Every column that is inverted divides by its scales, and a level also passes
on the errors of its neighbours. With n columns inverted, smallest scale |g| and float32's spacing e = 2^-23,
the difference of all gradients from those of ordinary autograd, as a share of their norm, is near

    e / |g|^(2 n)

as long as that is far below 1; beyond, nothing of the gradient is left. Measured, as a multiple of it: 0.4 to
0.9 with RevColV2-B (2, 4, 8 columns a chain, scales 0.1 to 0.5), 1.1 with a nano after its demo pre-training,
0.05 to 0.8 with untrained narrow RevColV2, 1.0 to 2.4 with RevCol (4 to 16 columns, scales 0.3 to 0.7).
`vitpipe benchmark reversible` measures errors anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from vitpipe.models.reversible import (
    SMALLEST_SCALE,
    Column,
    MemoryMode,
    autocasts,
    clamp_scales,
    smallest_scale,
)

RequestedMode = Literal["auto", "plain", "column", "reversible"]

SAFE_ERROR = 1e-4
"""Largest difference of gradients to expect, as a share of their norm; single tensors: 50 times as much."""

SAFE_SCALE = 0.2
"""No scale may be smaller, however short the chain. Two columns have an expected error of 7e-5 there."""

_SPACING = torch.finfo(torch.float32).eps


def expected_error(num_inversions: int, smallest_scale: float) -> float:
    """How far gradients are off when so many columns are inverted; see the module."""
    return _SPACING / smallest_scale ** (2 * num_inversions)


def safe_scale(num_inversions: int) -> float:
    """The smallest |scale| with which a chain may be inverted: 0.2 to 2 columns, 0.43 for 4, 0.66 for 8."""
    return max(SAFE_SCALE, (_SPACING / SAFE_ERROR) ** (0.5 / max(1, num_inversions)))


class ModeChoice(NamedTuple):
    """The mode to use, and why it is not the one that was asked for (empty if it is)."""

    mode: MemoryMode
    reason: str


def resolve_mode(
    requested: RequestedMode,
    *,
    under_autocast: bool,
    smallest_scale: float,
    num_inversions: int,
    allow_reversible_amp: bool = False,
) -> ModeChoice:
    """Choose how to remember.

    Args:
        requested: `auto` is `reversible` in float32 and `column` under autocast.
        under_autocast: whether autocast is on. The inverse then amplifies rounding to the lower precision:
            states were found 4 to 7 % off after two columns.
        smallest_scale: min |scale| over the columns.
        num_inversions: how many columns are inverted one after the other.
        allow_reversible_amp: keep `reversible` under autocast all the same.
    """
    mode: MemoryMode = ("column" if under_autocast else "reversible") if requested == "auto" else requested
    if mode != "reversible":
        return ModeChoice(mode, "")
    if under_autocast and not allow_reversible_amp:
        return ModeChoice("column", "memory_mode 'reversible' is not accurate under autocast")
    bound = safe_scale(num_inversions)
    if not smallest_scale >= bound:
        return ModeChoice(
            "column",
            f"the smallest scale of the columns is {smallest_scale:.3g}, and below {bound:.2g} "
            f"states rebuilt through {num_inversions} columns are too inexact",
        )
    return ModeChoice("reversible", "")


def num_inversions(columns: Sequence[Column]) -> int:
    """How many of the columns have states before them to rebuild."""
    return sum(bool(column.scales()) for column in columns)


class MemoryPolicy:
    """Prepares the chains of one network before each forward: holds the scales off 0, chooses the mode.

    Warns once if the mode is not the one that was asked for.
    """

    def __init__(self, requested: RequestedMode = "auto", *, allow_reversible_amp: bool = False) -> None:
        self.requested = requested
        self.allow_reversible_amp = allow_reversible_amp
        self.warned = False

    def prepare(
        self, columns: Sequence[Column], device: torch.device, *, training: bool, complete: bool = True
    ) -> MemoryMode:
        """Clamp the scales when training, and say how to remember these columns, which follow one another.

        Args:
            complete: whether every level is run; a chain with levels left out cannot be inverted.
        """
        if not torch.is_grad_enabled():
            return "plain"
        smallest = smallest_scale(columns)
        # Only when needed: changing parameters would spoil the graph of an earlier forward.
        if training and smallest < SMALLEST_SCALE:
            clamp_scales(columns)
        if not complete:
            return "plain" if self.requested == "plain" else "column"
        choice = resolve_mode(
            self.requested,
            under_autocast=autocasts(device),
            smallest_scale=smallest,
            num_inversions=num_inversions(columns),
            allow_reversible_amp=self.allow_reversible_amp,
        )
        if choice.reason and not self.warned:
            self.warned = True
            warnings.warn(
                f"{choice.reason}; from here on columns are kept one by one (memory_mode 'column': the same "
                "gradients, more memory)",
                RuntimeWarning,
                stacklevel=3,
            )
        return choice.mode
