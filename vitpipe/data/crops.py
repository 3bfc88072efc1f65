"""Multi-crop: two global views and several local views of one image, augmented independently.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (NeurIPS 2020);
augmentations and their order are those of DINO (ICCV 2021), which SelfPatch uses, too: crop, flip, colour
jitter, greyscale, blur, solarise, normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from vitpipe.config.multi_crop import CropsConfig
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.data.augment import Chain, Normalise, OnPillow, RandomFlip, RandomResizedCrop

# DINO's threshold, which is also the default of Pillow's `solarize`.
_SOLARISE_FROM = 128


class MultiCrop:
    """All views of an image: global 1, global 2, then the local ones.

    Args:
        config: sizes and augmentations.
        mean, std: per channel, subtracted and divided by.
    """

    def __init__(
        self,
        config: CropsConfig,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        # Three kinds, because blur and solarisation differ between the two global views. Local views share
        # one chain: it has no state, and draws come from the global generators.
        first, second, local = (_view(config, kind, Normalise(mean, std)) for kind in range(3))
        self.views = (first, second, *[local] * config.num_local)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """RGB image -> one (3, S, S) float32 tensor per view; S differs between global and local views."""
        # The image is decoded once; views are made in this order because they share one stream of draws.
        return [view(image) for view in self.views]


class RandomBlur:
    """Pillow's Gaussian blur with a probability; the radius (Pillow's sigma, pixels) is drawn uniformly."""

    def __init__(self, probability: float, radius: tuple[float, float]) -> None:
        self.probability, self.radius = probability, radius

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image."""
        # The radius is drawn only when the blur is applied, as in DINO's code.
        if torch.rand(1) >= self.probability:
            return image
        low, high = self.radius
        return image.filter(ImageFilter.GaussianBlur(float(low + (high - low) * torch.rand(1))))


class RandomSolarise:
    """Invert all values of at least 128, with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image."""
        return ImageOps.solarize(image, _SOLARISE_FROM) if torch.rand(1) < self.probability else image


class PillowSequence:
    """Transforms of Pillow images as one, so that packed pixels are converted once and not per transform."""

    def __init__(self, steps: Sequence[Callable[[Image.Image], Image.Image]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image."""
        for step in self.steps:
            image = step(image)
        return image


def pillow_steps(config: CropsConfig, kind: int) -> list[Callable[[Image.Image], Image.Image]]:
    """Colour jitter, greyscale, blur and, where its probability is above 0, solarisation of one kind of view.

    Args:
        kind: 0 and 1 for the two global views, 2 for the local ones.
    """
    # Imported here, so that stages without multi-crop do not load torchvision.
    from torchvision import transforms

    jitter = transforms.ColorJitter(*config.jitter)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        transforms.RandomApply([jitter], config.jitter_probability),
        transforms.RandomGrayscale(config.grey_probability),
        RandomBlur(config.blur_probability[kind], config.blur_radius),
    ]
    # Left out at probability 0, not only skipped: it would consume one draw per view, which DINO's does not.
    if config.solarise_probability[kind] > 0.0:
        steps.append(RandomSolarise(config.solarise_probability[kind]))
    return steps


def _view(config: CropsConfig, kind: int, normalise: Normalise) -> Chain:
    local = kind == 2
    size, scale = (
        (config.local_size, config.local_scale) if local else (config.global_size, config.global_scale)
    )
    return Chain(
        [
            RandomResizedCrop(size, scale, config.crop_ratio, config.interpolation),
            RandomFlip(config.flip_probability),
            OnPillow(PillowSequence(pillow_steps(config, kind))),
            normalise,
        ]
    )
