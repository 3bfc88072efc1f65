"""What every method is: a module that turns a batch into losses.

A method owns its networks; the loop owns everything else (accumulation, precision, ranks, optimiser). It is
called through `forward`, so that `DistributedDataParallel` can wrap it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from vitpipe.data.batches import Batch
from vitpipe.models.network import Network


@dataclass(frozen=True)
class Draw:
    """What every random draw of one micro-batch is a function of.

    A method that needs randomness takes it from these three numbers, or from torch's global generators,
    which the loop seeds from them before each call. So a resumed run draws what an undisturbed one does,
    and eight ranks draw what one rank with eight micro-batches does.

    Attributes:
        step: optimiser steps done before.
        chunk: number of the micro-batch within the step, over all ranks.
    """

    seed: int
    step: int
    chunk: int


class Method(nn.Module, ABC):
    """Base of all methods; `model` is the network whose weights are the result."""

    model: nn.Module

    @abstractmethod
    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Scalars of one micro-batch, each a mean over its images; `loss` is the one to minimise."""

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The losses, and what the network says about itself; see `losses` and `Network.diagnostics`."""
        about = self.model.diagnostics() if isinstance(self.model, Network) else {}
        return {**self.losses(batch, draw), **about}
