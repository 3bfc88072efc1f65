"""Exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """EMA of a network: shadow = decay * shadow + (1 - decay) * weight after every step.

    Args:
        model: the network that is trained; its weights are the start of the average.
        decay: share of the old value, in (0, 1).

    Attributes:
        shadow: name -> averaged tensor, for every entry of the network's state dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # The state dict and not the parameters: running statistics of batch norms are averaged, too.
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the current weights of the network in, after an optimiser step."""
        old, new = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                old.append(self.shadow[name])
                new.append(value.detach())
            else:
                # Integers (counters of batches, index tables) have no meaningful average.
                self.shadow[name].copy_(value)
        # One pass over all tensors; a product and a sum would read and write the average twice.
        torch._foreach_lerp_(old, new, 1.0 - self.decay)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Load a saved average; names and shapes must be those of the network."""
        # Copied in place, so that the tensors stay on their device.
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
