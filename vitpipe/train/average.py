"""Exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """A shadow of a network: shadow = decay * shadow + (1 - decay) * weight after every step.

    Starts as a copy of the weights. What is not floating point (counters, indices) is copied.

    Args:
        model: the network that is trained.
        decay: share of the old shadow, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadow towards the weights."""
        old, new = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                old.append(self.shadow[name])
                new.append(value.detach())
            else:
                self.shadow[name].copy_(value)
        torch._foreach_mul_(old, self.decay)
        torch._foreach_add_(old, new, alpha=1.0 - self.decay)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over a saved shadow; names and shapes are those of the network."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
