"""Exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Place(NamedTuple):
    """Where a module keeps a tensor: its table of parameters or of buffers, and the name in it."""

    table: Mapping[str, Tensor | None]
    name: str


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
        # Collecting the state dict of a network of 300 tensors takes 6 ms, a tenth of a demo's step. The
        # tables are looked into again each time, so a module may put another tensor into its place.
        self._places = {name: place for name, place in _places(model) if name in self.shadow}
        assert self._places.keys() == self.shadow.keys()

    @torch.no_grad()
    def update(self) -> None:
        """Average the current weights of the network in, after an optimiser step."""
        old, new = [], []
        for name, place in self._places.items():
            value = place.table[place.name]
            assert value is not None
            if value.is_floating_point():
                old.append(self.shadow[name])
                new.append(value)
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


def _places(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    """The name of every parameter and buffer, as in the state dict, and its place."""
    # A module that is used twice has two names, in the state dict, too.
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for name in table:
                yield f"{prefix}.{name}".lstrip("."), _Place(table, name)
