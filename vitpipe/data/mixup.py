"""Mixup and CutMix with label smoothing: images and labels to mixed images and soft targets.

Mixup: Zhang et al., ICLR 2018. CutMix: Yun et al., ICCV 2019. Defined as timm's `Mixup` in batch mode: one
lambda per batch, each image mixed with its counterpart in the reversed batch, CutMix's lambda corrected to
the pasted area.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.seeds import generator_of


# Not timm's class: that draws from NumPy's global generator, so that a result would depend on all draws
# before it, and it asserts an even batch size.
class Mixup:
    """Mixes a batch; with both alphas 0 it only makes the soft targets.

    Args:
        augment: `mixup_alpha`, `cutmix_alpha`, `mix_probability` (of mixing a batch at all),
            `mix_switch_probability` (of CutMix when both are on).
        num_classes: K.
        label_smoothing: share of the probability mass that is spread evenly over all classes.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, label_smoothing: float) -> None:
        self.augment, self.num_classes, self.label_smoothing = augment, num_classes, label_smoothing

    def __call__(self, images: Tensor, labels: Tensor, *, key: int) -> tuple[Tensor, Tensor]:
        """Mix (B, C, H, W) images and labels (B,) into new images and targets (B, K) float32.

        Args:
            key: determines all draws. One for the whole batch, as images of a batch are mixed with each
                other: the result depends on the micro-batch.
        """
        generator = generator_of("mix", key)
        share, box = self._draw(generator, images.shape[-2], images.shape[-1])
        targets = self.soft_targets(labels)
        if share == 1.0:
            return images, targets
        # The reversed batch needs no permutation and no draw. In an odd batch the middle image is mixed
        # with itself. Nothing is changed in place: a diverged step saves the loader's own batch.
        if box is None:
            mixed = images * share + images.flip(0) * (1.0 - share)
        else:
            top, bottom, left, right = box
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        return mixed, targets * share + targets.flip(0) * (1.0 - share)

    def soft_targets(self, labels: Tensor) -> Tensor:
        """Smoothed one-hot targets: (B,) -> (B, K) float32, rows sum to 1."""
        # timm's definition: the true class gets 1 - smoothing + smoothing / K.
        off = self.label_smoothing / self.num_classes
        targets = torch.full((labels.shape[0], self.num_classes), off, device=labels.device)
        return targets.scatter_(1, labels.long()[:, None], 1.0 - self.label_smoothing + off)

    def _draw(
        self, generator: np.random.Generator, height: int, width: int
    ) -> tuple[float, tuple[int, int, int, int] | None]:
        """Lambda (the share of the image itself), and CutMix's box: top, bottom, left, right in pixels."""
        mixup, cutmix = self.augment.mixup_alpha, self.augment.cutmix_alpha
        if max(mixup, cutmix) == 0.0 or generator.random() >= self.augment.mix_probability:
            return 1.0, None
        both = mixup > 0.0 and cutmix > 0.0
        if not (generator.random() < self.augment.mix_switch_probability if both else cutmix > 0.0):
            return float(generator.beta(mixup, mixup)), None
        # A box of area 1 - lambda with the image's aspect ratio (CutMix, equation 2).
        side = math.sqrt(1.0 - generator.beta(cutmix, cutmix))
        top, bottom = _span(generator, height, int(height * side))
        left, right = _span(generator, width, int(width * side))
        # The box may be clipped at the border: lambda is taken from the pasted area (timm's `correct_lam`).
        return 1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def _span(generator: np.random.Generator, size: int, length: int) -> tuple[int, int]:
    """A span of `length` pixels around a uniformly drawn centre, clipped to [0, size]."""
    centre = int(generator.integers(0, size))
    # An odd length has its extra pixel after the centre, as in timm's `rand_bbox`.
    return max(0, centre - length // 2), min(size, centre + (length + 1) // 2)
