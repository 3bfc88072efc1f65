"""Classification with intermediate supervision: mix > logits and images at K depths > compound loss.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696, section 3 (intermediate supervision). With
the mixed image x, the soft target t, and heads i = 1 ... K from the first depth to the classifier's own:

    loss = sum_{i < K} alpha_i * BCE(image_i, x) + sum_{i < K} beta_i * CE(logits_i, t) + CE(logits_K, t)

alpha falls from depth to depth, beta rises: early features keep the picture, late ones become semantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.train_sections import AugmentConfig, TrainConfig
from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.methods.classify.method import Classify, network_and_mixing, soft_cross_entropy
from vitpipe.methods.intermediate_supervision.config import IntermediateSupervisionConfig
from vitpipe.models.families import Family
from vitpipe.models.network import Classifier, IntermediateHeads, IntermediateOutputs

# At a target of exactly 0 or 1 the cross entropy would drive logits to infinity; the released code's bounds.
_DARKEST, _BRIGHTEST = 0.01, 0.99


class HeadLosses(NamedTuple):
    """Unweighted losses of the heads, first to last; scalars.

    Attributes:
        pixels: K - 1 binary cross entropies, means over all pixels and channels.
        classes: K soft-target cross entropies, the last that of the classifier itself.
    """

    pixels: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]


class HeadWeights(NamedTuple):
    """Weights in the compound loss, first head to last: alpha of K - 1 images, beta of K classifiers."""

    pixels: tuple[float, ...]
    classes: tuple[float, ...]


class IntermediateSupervision(Classify):
    """Trains a classifier and auxiliary heads on mixed images.

    The result is the classifier alone; the heads are saved beside it.

    Args:
        model: (B, 3, H, W) -> logits (B, K).
        mix: see `Classify`.
        classes: names of the classes.
        heads: of this classifier.
        config: weights of the losses.
        augment: mean and std that images are normalised with.
    """

    model: Classifier
    mean_311: Tensor
    std_311: Tensor

    def __init__(
        self,
        model: Classifier,
        mix: Mixup,
        classes: Sequence[str],
        *,
        heads: IntermediateHeads,
        config: IntermediateSupervisionConfig,
        augment: AugmentConfig,
    ) -> None:
        super().__init__(model, mix, classes)
        self.heads, self.config = heads, config
        # Constants of the recipe: on the method's device, but in no saved state.
        self.register_buffer("mean_311", torch.tensor(augment.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(augment.std).view(3, 1, 1), persistent=False)

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> IntermediateSupervision:
        """The family's classifier and heads, with as many classes as the training set.

        Raises:
            RecipeError: when the stage is not one of supervised training, or the family has no such heads.
            InputError: when the network is too shallow for them.
        """
        assert isinstance(config, IntermediateSupervisionConfig)
        network, mix = network_and_mixing(config, family, model, section, classes)
        heads = family.intermediate_heads(model, num_classes=len(classes))
        return cls(network, mix, classes, heads=heads, config=config, augment=section.augment)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: the compound loss. Its parts without weights: `pixel_loss_1` ..., `class_loss_1` ...

        All are means over the batch.
        """
        images, targets = self.mix(batch.images, batch.labels_B, key=batch.key("mix"))
        # The mixed image is also what the decoders shall give back.
        found = head_losses(self.heads(self.model, images), self.pixels(images), targets)
        weights = head_weights(len(found.classes), self.config.pixel_weight, self.config.class_weight)
        parts = {f"pixel_loss_{i}": loss.detach() for i, loss in enumerate(found.pixels, 1)}
        parts |= {f"class_loss_{i}": loss.detach() for i, loss in enumerate(found.classes, 1)}
        return {"loss": compound_loss(found, weights), **parts}

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> values in 0.01 ... 0.99, the target of the decoders."""
        return (images_BCHW * self.std_311 + self.mean_311).clamp(_DARKEST, _BRIGHTEST)

    def results(self) -> dict[str, nn.Module]:
        """The classifier, and the heads beside it."""
        return {"weights": self.model, "heads": self.heads}


def head_losses(outputs: IntermediateOutputs, pixels_BCHW: Tensor, targets_BK: Tensor) -> HeadLosses:
    """The losses of all heads, in float32.

    Args:
        outputs: of `IntermediateHeads`.
        pixels_BCHW: values in 0 ... 1.
        targets_BK: class probabilities.
    """
    return HeadLosses(
        # float32 under autocast, too: a mean over 150,000 values.
        tuple(F.binary_cross_entropy_with_logits(image.float(), pixels_BCHW) for image in outputs.images),
        tuple(soft_cross_entropy(logits, targets_BK) for logits in outputs.logits),
    )


def head_weights(num_heads: int, pixel_weight: float, class_weight: float) -> HeadWeights:
    """Weights by depth, linear as in RevCol's released code; of i = 1 ... K heads:

    alpha_i = pixel_weight * (K - i) / (K - 1), beta_i = class_weight * i / K, and beta_K = 1.
    """
    num_aux = num_heads - 1
    return HeadWeights(
        tuple(pixel_weight * (1 - i / num_aux) for i in range(num_aux)),
        (*(class_weight * (i + 1) / num_heads for i in range(num_aux)), 1.0),
    )


def compound_loss(losses: HeadLosses, weights: HeadWeights) -> Tensor:
    """The weighted sum of all losses, a scalar."""
    pairs = zip((*losses.pixels, *losses.classes), (*weights.pixels, *weights.classes), strict=True)
    return torch.stack([weight * loss for loss, weight in pairs]).sum()


METHOD = IntermediateSupervision
