"""Choose how a network of reversible columns keeps activations: the requested mode, or a more exact one.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005. The modes are those of `reversible.run_chain`.

Accuracy of the gradients of inverted columns: every inverted column divides by its scales, and a level also
passes on the errors of its neighbours. With n inverted columns, smallest scale |g| and float32's spacing
e = 2^-23, the difference of all gradients from those of ordinary autograd, relative to their norm, is about

    e / |g|^(2 n)

as long as that is far below 1; above, the gradient is noise.
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

# 90 times smaller than the error of training in bfloat16, which measured 0.9 % on RevColV2-B.
SAFE_ERROR = 1e-4
"""Largest acceptable difference of all gradients, relative to their norm; of one tensor: 50 times as much."""

# Measured with RevColV2-B (2 + 2 columns, masked pre-training), all gradients / worst tensor: at scale 0.2
# 4.8e-5 / 1.7e-3, at 0.1 8.9e-4 / 6.4e-2; at 0.01 the rebuilt states are off by more than 10.
SAFE_SCALE = 0.2
"""No scale may be smaller, however short the chain. Two columns have an expected error of 7e-5 there."""

# 2^-23: the distance from 1 to the next float32.
_SPACING = torch.finfo(torch.float32).eps


def expected_error(num_inversions: int, smallest_scale: float) -> float:
    """Expected difference of all gradients, relative to their norm, after so many inversions; see above."""
    # Measured, as a multiple of this: 0.4 to 0.9 with RevColV2-B (2, 4, 8 columns a chain, scales 0.1 to
    # 0.5), 1.1 with a nano after its demo pre-training, 0.05 to 0.8 with untrained narrow RevColV2, 1.0 to
    # 2.4 with RevCol (4 to 16 columns, scales 0.3 to 0.7). `vitpipe benchmark reversible` measures it again.
    return _SPACING / smallest_scale ** (2 * num_inversions)


def safe_scale(num_inversions: int) -> float:
    """The smallest |scale| with which a chain may be inverted: 0.2 to 2 columns, 0.43 for 4, 0.66 for 8."""
    # `expected_error` solved for the scale; max(1, ...) because a chain without inversions has no error at
    # all.
    return max(SAFE_SCALE, (_SPACING / SAFE_ERROR) ** (0.5 / max(1, num_inversions)))


class ModeChoice(NamedTuple):
    """The mode to use, and why it is not the requested one (empty if it is)."""

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
    """Choose the memory mode of a chain.

    Args:
        requested: `auto` is `reversible` in float32 and `column` under autocast.
        under_autocast: whether autocast is on.
        smallest_scale: min |scale| over the columns.
        num_inversions: how many columns are inverted one after the other.
        allow_reversible_amp: keep `reversible` under autocast nevertheless.
    """
    # Under autocast a rebuilt state differs from the true one by float32 rounding; where F rounds it to
    # bfloat16, some entries fall to the other side and the next inverse amplifies a bfloat16 step. Measured:
    # states 4 to 7 % off after two columns, gradients 3.1 % in pre-training, while bfloat16 itself costs 0.9
    # %.
    mode: MemoryMode = ("column" if under_autocast else "reversible") if requested == "auto" else requested
    if mode != "reversible":
        return ModeChoice(mode, "")
    if under_autocast and not allow_reversible_amp:
        return ModeChoice("column", "memory_mode 'reversible' is not accurate under autocast")
    bound = safe_scale(num_inversions)
    # Not `<`: a scale that is NaN must not be inverted either.
    if not smallest_scale >= bound:
        return ModeChoice(
            "column",
            f"the smallest scale of the columns is {smallest_scale:.3g}; below {bound:.2g}, "
            f"states rebuilt through {num_inversions} columns are too inexact",
        )
    return ModeChoice("reversible", "")


def num_inversions(columns: Sequence[Column]) -> int:
    """How many of the columns are inverted: those with scales. A first column has no states to rebuild."""
    return sum(bool(column.scales()) for column in columns)


class MemoryPolicy:
    """Prepares the chains of one network before each forward: keeps the scales away from 0, chooses the mode.

    Warns once if the mode is not the requested one.

    Args:
        requested: of the recipe (`model.columns.memory_mode`).
        allow_reversible_amp: see `resolve_mode`.
    """

    def __init__(self, requested: RequestedMode = "auto", *, allow_reversible_amp: bool = False) -> None:
        self.requested = requested
        self.allow_reversible_amp = allow_reversible_amp
        self.warned = False

    def prepare(
        self, columns: Sequence[Column], device: torch.device, *, training: bool, complete: bool = True
    ) -> MemoryMode:
        """Clamp the scales when training, and choose the mode for these columns, which follow one another.

        Args:
            columns: one chain. Each chain is judged alone: a network's other chains may be shorter.
            device: whose autocast setting counts.
            training: whether the network is in training mode; only then are scales changed.
            complete: whether every level is run; a chain with levels left out cannot be inverted.
        """
        if not torch.is_grad_enabled():
            return "plain"
        smallest = smallest_scale(columns)
        # Only when needed: an in-place change raises the parameter's version, and the backward of an earlier
        # forward (two forwards before one backward) would fail.
        if training and smallest < SMALLEST_SCALE:
            clamp_scales(columns)
        # Without a warning: levels are left out on purpose (classification), not because of the scales.
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
                f"{choice.reason}; memory_mode 'column' is used instead (the same gradients, more memory)",
                RuntimeWarning,
                stacklevel=3,  # the caller of the network's method that calls this one
            )
        return choice.mode
