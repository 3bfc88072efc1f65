"""The interfaces of all networks, whatever their family.

Stages, methods and `vitpipe.dense` use these classes only. A paper is added by networks that implement them
and by a `Family` that builds them (families.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitpipe.config.resolve import layer_scales
from vitpipe.contracts.errors import InputError
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
        """Number of layer ids; for classifiers also stated without torch: `ModelConfig.num_layers`."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars about the network's own health, logged beside the losses."""
        return {}

    def layer_scales(self, decay: float) -> tuple[float, ...]:
        """Factor on the learning rate of each layer id, for a layer decay as the paper states it."""
        return layer_scales(decay, self.num_layers, self.decay_stated_for)


@dataclass(frozen=True)
class Features:
    """What an encoder computes of a batch of images.

    The tuples have one item per block that was asked for, in the order of asking. Tokens are as a block puts
    them out, before any norm that follows the last block (see `Encoder.final_norm`).

    Attributes:
        tokens: (B, N, C) each, the cells of a grid row by row, N = rows * columns.
        grids: (rows, columns) of each; blocks at several strides have several grids.
        pooled: (B, C), one vector per image, before any norm of a head.
        class_tokens: (B, C) each; empty in networks without a class token.
        attention: (B, H, Q, K) each, the probabilities of H heads for Q queries over K keys, where asked for.
    """

    tokens: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]
    pooled: Tensor
    class_tokens: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()

    def maps(self) -> tuple[Tensor, ...]:
        """The tokens as maps, (B, C, rows, columns) each."""
        pairs = zip(self.tokens, self.grids, strict=True)
        return tuple(tokens.transpose(1, 2).unflatten(2, grid) for tokens, grid in pairs)


class Encoder(Network):
    """Images to tokens and one vector per image: what methods, probes and explanations work on."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of blocks whose tokens `features` gives."""

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """C of `Features.pooled`."""

    @abstractmethod
    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """(B, 3, H, W) -> tokens of some blocks, and the vector that the paper's linear probe reads.

        Gradients flow through all of it.

        Args:
            images_BCHW: normalised.
            blocks: 0 ... `num_blocks` - 1, or negative from the last.
            attention: compute the attention of these blocks, too.

        Raises:
            InputError: when there is no such block, its attention cannot be given, or the image has a size
                that the network cannot take.
        """

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm between the last block and the pooling, for tokens of any block; unchanged without one."""
        return tokens

    def location_grid(self, features: Features) -> Tensor:
        """The grid on which drloc localises cells, (B, D, rows, columns): of the last block, before any norm.

        A network that was published with another place overrides this.

        Args:
            features: with the tokens of the last block as their last.
        """
        return features.maps()[-1]

    def frozen_features(self, images_BCHW: Tensor, last_blocks: int = 1) -> Tensor:
        """(B, 3, H, W) -> (B, C * last_blocks): the features of the paper's linear probe, before any head.

        Of one block `Features.pooled`; of more their class tokens behind the final norm, block by block. The
        last C are those of one block. An encoder with another vector for a block overrides this and
        `frozen_reading`.

        Args:
            images_BCHW: normalised.
            last_blocks: how many blocks from the end; DINO's linear probe reads 4.

        Raises:
            InputError: when there are not so many blocks, or no class tokens.
        """
        # Without a norm of the probe: k-NN and linear probe bring their own scaling (`FrozenProbe`).
        if last_blocks == 1:
            return self.features(images_BCHW).pooled
        if not 1 <= last_blocks <= self.num_blocks:
            raise InputError(
                f"Features of {last_blocks} blocks of the {self.family} network, which has {self.num_blocks}",
                where="last_blocks",
                fix=f"give a number from 1 to {self.num_blocks}",
            )
        found = self.features(images_BCHW, range(-last_blocks, 0))
        if not found.class_tokens:
            raise InputError(
                f"The {self.family} network has no class tokens to read in its last {last_blocks} blocks",
                where="last_blocks",
                fix="set it to 1, or choose a network with a class token",
            )
        return torch.cat([self.final_norm(token_BC) for token_BC in found.class_tokens], dim=1)

    def frozen_reading(self, last_blocks: int = 1) -> str:
        """What `frozen_features` reads, in words for the protocol beside a number."""
        if last_blocks == 1:
            return "image vector behind the last block"
        return f"class tokens of the last {last_blocks} blocks, each behind the final norm"

    def image_attention(self, images_BCHW: Tensor) -> Tensor | None:
        """Share of each cell of the grid in the image's vector, mean over the heads: (B, rows, columns).

        `None` for networks whose vector is no result of attention.
        """
        return None

    def assignment(self, images_BCHW: Tensor, stage: int) -> tuple[Tensor, tuple[int, int]]:
        """Shares of the patches in each cluster, (B, M, N), in the first block of a stage, and its grid.

        Args:
            images_BCHW: normalised.
            stage: from 1.

        Raises:
            InputError: when the network, or this stage of it, has no clusters.
        """
        raise InputError(
            f"The {self.family} network has no clusters of patches",
            where="model.name",
            fix="choose a paca model",
        )

    def chosen_blocks(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Block numbers from 0, negative ones resolved.

        Raises:
            InputError: when there is no such block.
        """
        wrong = [block for block in blocks if not -self.num_blocks <= block < self.num_blocks]
        if wrong:
            raise InputError(
                f"The {self.family} network has no block {wrong[0]}",
                where="blocks",
                fix=f"give numbers from 0 to {self.num_blocks - 1}, or negative ones from the last",
            )
        return tuple(block % self.num_blocks for block in blocks)

    def refuse_attention(self, asked: bool) -> None:
        """For encoders that cannot give their attention.

        Raises:
            InputError: when it is asked for.
        """
        if asked:
            raise InputError(
                f"The {self.family} network cannot give its attention",
                where="attention",
                fix="choose a network of global attention, for example a hivit model",
            )


class Classifier(Encoder):
    """Images to logits; features and logits of one forward pass for losses on both."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of logits."""

    def forward_features(self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,)) -> Features:
        """(B, 3, H, W) -> what the head reads (`pooled`), and tokens of blocks on the way to it.

        Raises:
            InputError: as `features`.
        """
        # A network whose linear probe reads another place than its head overrides this.
        return self.features(images_BCHW, blocks)

    @abstractmethod
    def logits(self, features: Features) -> Tensor:
        """Features of `forward_features` -> (B, num_classes)."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        return self.logits(self.forward_features(images_BCHW))


class IntermediateOutputs(NamedTuple):
    """What heads at K depths of a classifier give, first to last.

    Attributes:
        logits: K times (B, num_classes); the last are the classifier's own.
        images: K - 1 times (B, 3, H, W), logits of pixel values in 0 ... 1.
    """

    logits: tuple[Tensor, ...]
    images: tuple[Tensor, ...]


class IntermediateHeads(nn.Module, ABC):
    """Auxiliary classifiers and decoders at several depths of a classifier, for its training only."""

    # Beside the classifier and not a part of it: its weights are the same with and without them.
    @abstractmethod
    def forward(self, model: Classifier, images_BCHW: Tensor) -> IntermediateOutputs:
        """(B, 3, H, W) through the classifier -> the outputs of all heads, and the classifier's own."""


class Pretrainer(Network):
    """Masked images to pixels.

    Attributes:
        num_units: units that an image is cut into.
    """

    num_units: int

    @abstractmethod
    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MaskedPrediction:
        """Hide units by noise (uniform, (B, N)) and predict them."""


class FeaturePrediction(NamedTuple):
    """Features that a network predicts for every unit of an image, in image order, (B, N, D) each.

    Attributes:
        main_BND: by the whole network.
        early_BND: by a head behind a part of its blocks, which is thrown away after pre-training.
    """

    main_BND: Tensor  # noqa: N815
    early_BND: Tensor  # noqa: N815


class FeaturePredictor(Network):
    """Images with hidden units to the features that a teacher computes of the whole image.

    Attributes:
        grid_side: units per side of an image.
    """

    grid_side: int

    @abstractmethod
    def forward(self, images_BCHW: Tensor, mask_BN: Tensor) -> FeaturePrediction:
        """Hide the units whose mask is 1, and predict the features of all units."""


class DenseBackbone(Network):
    """Images to the maps that a detection or segmentation head reads, finest first.

    Attributes:
        restarted: ends of names of parameters that begin anew here, although the rest is pre-trained; they
            may have a learning rate of their own.
    """

    restarted: tuple[str, ...] = ()

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
