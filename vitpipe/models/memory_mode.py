"""How a network of reversible columns remembers: the mode asked for, or a safer one.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005. The modes are those of `reversible.run_chain`; the bounds were measured on RevColV2-B.
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

SAFE_SCALE = 0.2
"""Below it the rebuilt states are too inexact for training: in float32, with two columns, gradients are off
by 5e-5 at 0.2, by 9e-4 at 0.1, and are garbage at 0.01."""


class ModeChoice(NamedTuple):
    """The mode to use, and why it is not the one that was asked for (empty if it is)."""

    mode: MemoryMode
    reason: str


def resolve_mode(
    requested: RequestedMode,
    *,
    under_autocast: bool,
    smallest_scale: float,
    allow_reversible_amp: bool = False,
) -> ModeChoice:
    """Choose how to remember.

    Args:
        requested: `auto` is `reversible` in float32 and `column` under autocast.
        under_autocast: whether autocast is on. The inverse then amplifies rounding to the lower precision:
            states were found 4 to 7 % off after two columns.
        smallest_scale: min |scale| over the chains.
        allow_reversible_amp: keep `reversible` under autocast all the same.
    """
    mode: MemoryMode = ("column" if under_autocast else "reversible") if requested == "auto" else requested
    if mode != "reversible":
        return ModeChoice(mode, "")
    if under_autocast and not allow_reversible_amp:
        return ModeChoice("column", "memory_mode 'reversible' is not accurate under autocast")
    if not smallest_scale >= SAFE_SCALE:
        return ModeChoice(
            "column",
            f"the smallest scale of the columns is {smallest_scale:.3g}, and below {SAFE_SCALE} "
            "rebuilt states are too inexact",
        )
    return ModeChoice("reversible", "")


class MemoryPolicy:
    """Prepares the chains of one network before each forward: holds the scales off 0, chooses the mode.

    Warns once if the mode is not the one that was asked for.
    """

    def __init__(self, requested: RequestedMode = "auto", *, allow_reversible_amp: bool = False) -> None:
        self.requested = requested
        self.allow_reversible_amp = allow_reversible_amp
        self.warned = False

    def prepare(self, columns: Sequence[Column], device: torch.device, *, training: bool) -> MemoryMode:
        """Clamp the scales when training, and say how to remember. Columns of all chains of the network."""
        if not torch.is_grad_enabled():
            return "plain"
        smallest = smallest_scale(columns)
        # Only when needed: changing parameters would spoil the graph of an earlier forward.
        if training and smallest < SMALLEST_SCALE:
            clamp_scales(columns)
        choice = resolve_mode(
            self.requested,
            under_autocast=autocasts(device),
            smallest_scale=smallest,
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
