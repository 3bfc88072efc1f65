"""The interfaces of all networks, whatever their family.

Stages, methods and `vitpipe.dense` use these classes only. A paper is added by networks that implement them
and by a `Family` that builds them (families.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from vitpipe.config.resolve import layer_scales
from vitpipe.models.masking import MaskedPrediction

Task = Literal["detect", "segment"]


class Network(nn.Module, ABC):
    """Base of the trained networks.

    Attributes:
        family: name of the family that builds it.
        decay_stated_for: layers of the network that the published layer decay was stated for, when it is to
            be spread over the layers of this one; else `None`.
        no_decay: ends of names of parameters with two or more dimensions that get no weight decay.
    """

    family: ClassVar[str]
    decay_stated_for: ClassVar[int | None] = None
    # Tensors of one dimension never decay (optim/groups.py), so they need no entry.
    no_decay: tuple[str, ...] = ()

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Layer id of a parameter for layer-wise learning rates: 0 (input) ... `num_layers` - 1 (head)."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of layer ids. For classifiers the registry states it too: see `ModelEntry.num_layers`."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars about the network's own health, logged beside the losses."""
        return {}

    def layer_scales(self, decay: float) -> tuple[float, ...]:
        """Factor on the learning rate of each layer id, for a layer decay as the paper states it."""
        return layer_scales(decay, self.num_layers, self.decay_stated_for)


class Classifier(Network):
    """Images to logits."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of logits."""

    @abstractmethod
    def frozen_features(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): the features of the paper's linear probe, before any norm or head."""
        # Without the norm: k-NN and linear probe bring their own scaling (`FrozenProbe`).

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """C of `frozen_features`."""

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""


class Pretrainer(Network):
    """Masked images to pixels.

    Attributes:
        num_units: units that an image is cut into.
    """

    num_units: int

    @abstractmethod
    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MaskedPrediction:
        """Hide units by noise (uniform, (B, N)) and predict them."""


class DenseBackbone(Network):
    """Images to the maps that a detection or segmentation head reads, finest first."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""

    @property
    def head_layer(self) -> int:
        """Layer id of everything behind the maps."""
        return self.num_layers - 1

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s)."""
