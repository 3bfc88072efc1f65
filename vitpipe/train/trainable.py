"""What the loop trains: networks with losses, parameter groups, hooks around the update, and results.

`methods.method.Method` and `dense.method.DenseMethod` are the two kinds; the loop knows neither.

    begin > for each step: [losses of each micro-batch > backward] > clip > before_update > optimiser
          > after_step ... > results
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from vitpipe.config.train_sections import OptimConfig
from vitpipe.contracts.seeds import seed_generators
from vitpipe.data.moment import Moment
from vitpipe.models.draws import image_draws
from vitpipe.models.network import Network
from vitpipe.optim.groups import parameter_groups
from vitpipe.train.ranks import Ranks


class MicroBatch(Protocol):
    """What the loop asks of a micro-batch."""

    @property
    def indices_B(self) -> Tensor:  # noqa: N802
        """Int64 positions of its samples in the training set; a sample occurs at most once in a step."""

    @property
    def moment(self) -> Moment:
        """The step that it belongs to."""

    def key(self, what: str) -> int:
        """The key of draws that its samples share, for one purpose; 64 bits."""

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""

    def contents(self) -> dict[str, Any]:
        """Its samples as tensors and plain values, which are saved when training diverges."""


class Trainable(nn.Module, ABC):
    """Base of all that the loop trains.

    Attributes:
        model: the network that learns: starting weights are loaded into it, its weights are averaged where
            the recipe says so, and its layers have the layer-wise learning rates. Named `model`.
        frozen: names of sub-modules that never change, for example `clip`: a saved state leaves them out.
    """

    model: nn.Module
    frozen: tuple[str, ...] = ()

    def begin(self) -> None:
        """Called before the first step, when `model` has its starting weights: a teacher may copy them."""
        # Not by `build`: starting weights are loaded after it. A resumed state is loaded after this.

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars of one micro-batch, each a mean over its images; `loss` is the one to minimise.

        Draws are functions of `batch.moment` and `batch.indices_B` (`models.draws.uniform`), so that they do
        not depend on the micro-batch. For networks of libraries torch's generators are seeded before.
        """
        # Means and not sums: the loop divides by the number of micro-batches.

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The losses, and the network's diagnostics; see `losses` and `Network.diagnostics`."""
        # The loop calls `forward` and not `losses`, because DistributedDataParallel hooks into calls of the
        # module.
        about = self.model.diagnostics() if isinstance(self.model, Network) else {}
        return {**self.losses(batch), **about}

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Optimiser groups of all parameters that require gradients, see `parameter_groups`.

        Layers of `model` have their own learning rates where the recipe decays them; everything else, such as
        projection heads, learns at the full rate.
        """
        network, decay = self.model, optim.layer_decay
        no_decay = network.no_decay if isinstance(network, Network) else ()
        named, weight_decay = self.named_parameters(), optim.weight_decay
        if decay is None or not isinstance(network, Network):
            return parameter_groups(named, weight_decay=weight_decay, no_decay=no_decay)

        def layer_of(name: str) -> int:
            inner = name.removeprefix("model.")
            return network.layer_of(inner) if inner != name else network.num_layers - 1

        return parameter_groups(
            named,
            weight_decay=weight_decay,
            no_decay=no_decay,
            layer_of=layer_of,
            layer_scales=network.layer_scales(decay),
        )

    def before_update(self, moment: Moment) -> None:
        """Called when a step's gradients are complete, true (not scaled) and clipped as the recipe says.

        For clipping per tensor, or for freezing by setting gradients to `None`.
        """

    def after_step(self, moment: Moment, ranks: Ranks) -> None:
        """Called after the optimiser's step, on every rank: a teacher's average, a centre, a queue.

        Args:
            moment: of the step that is done, as in `losses`.
            ranks: to sum over all ranks what they must have in common.
        """

    def warnings(self, means: Mapping[str, float], moment: Moment) -> list[str]:
        """What a user should know of a training that goes wrong; shown by the loop when it logs, on rank 0.

        Args:
            means: of `losses` over the steps since the last logged point.
            moment: of the step that is done.
        """
        return []

    def results(self) -> dict[str, nn.Module]:
        """What the stage saves, by file name: `weights` is what later stages start from."""
        return {"weights": self.model}

    def resume_state(self) -> dict[str, Tensor]:
        """What a saved state must have of the method; `frozen` modules are left out."""
        return {name: t for name, t in self.state_dict().items() if not self._is_frozen(name)}

    def load_resume_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restore `resume_state`.

        Raises:
            RuntimeError: when it does not fit, as `load_state_dict`.
        """
        frozen = {name: t for name, t in self.state_dict().items() if self._is_frozen(name)}
        self.load_state_dict({**frozen, **saved})

    def _is_frozen(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self.frozen)


def draws_of(batch: MicroBatch) -> AbstractContextManager[None]:
    """The context in which our networks draw per image; seeds the global generators, CPU and GPU, for others.

    With both no generator state has to be saved, and a resumed run draws the same.
    """
    seed_generators(batch.key("step"), gpus=True)
    return image_draws(batch.moment.key("network"), batch.indices_B)
