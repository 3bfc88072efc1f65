"""The interface of all methods: a module that computes losses of a batch.

A method owns its networks; the loop owns everything else (accumulation, precision, ranks, optimiser).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from vitpipe.data.batches import Batch
from vitpipe.models.network import Network


@dataclass(frozen=True)
class Draw:
    """All that random draws of one micro-batch may depend on.

    Attributes:
        seed: of the run.
        step: optimiser steps done before.
        chunk: index of the micro-batch within the step, over all ranks.
    """

    # A method draws from these three numbers, or from torch's global generators, which the loop seeds from
    # them before each call. So a resumed run draws the same as an uninterrupted one, and eight ranks the same
    # as one rank with eight micro-batches.
    seed: int
    step: int
    chunk: int


class Method(nn.Module, ABC):
    """Base of all methods; `model` is the network whose weights are the result."""

    model: nn.Module

    @abstractmethod
    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Scalars of one micro-batch, each a mean over its images; `loss` is the one to minimise."""
        # Means and not sums: the loop divides by the number of micro-batches.

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The losses, and the network's diagnostics; see `losses` and `Network.diagnostics`."""
        # The loop calls `forward` and not `losses`, because DistributedDataParallel hooks into calls of the
        # module.
        about = self.model.diagnostics() if isinstance(self.model, Network) else {}
        return {**self.losses(batch, draw), **about}
