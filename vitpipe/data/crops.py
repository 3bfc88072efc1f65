"""Multi-crop: two global views and several local ones of one image, each augmented on its own.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (NeurIPS 2020);
the augmentations and their order are those of DINO (ICCV 2021), which SelfPatch takes over: crop, flip,
colour jitter, greyscale, blur, solarise, normalise. The image is decoded once for all views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from vitpipe.config.recipe import CropsConfig
from vitpipe.data.augment import Chain, Normalise, OnPillow, RandomFlip, RandomResizedCrop

_SOLARISE_FROM = 128


class MultiCrop:
    """All views of an image: global 1, global 2, then the local ones."""

    def __init__(self, config: CropsConfig) -> None:
        first, second, local = (_view(config, kind) for kind in range(3))
        self.views = (first, second, *[local] * config.num_local)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """RGB image in, one (3, S, S) float32 per view out; S differs between global and local ones."""
        return [view(image) for view in self.views]


class RandomBlur:
    """Gaussian blur by Pillow, with a radius drawn uniformly, with a probability."""

    def __init__(self, probability: float, radius: tuple[float, float]) -> None:
        self.probability, self.radius = probability, radius

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image in and out."""
        if torch.rand(1) >= self.probability:
            return image
        low, high = self.radius
        return image.filter(ImageFilter.GaussianBlur(float(low + (high - low) * torch.rand(1))))


class RandomSolarise:
    """Invert all values from 128 on, with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image in and out."""
        return ImageOps.solarize(image, _SOLARISE_FROM) if torch.rand(1) < self.probability else image


class InTurn:
    """Several steps as one, so that an image is handed to Pillow once."""

    def __init__(self, steps: Sequence[Callable[[Image.Image], Image.Image]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image in and out."""
        for step in self.steps:
            image = step(image)
        return image


def pillow_steps(config: CropsConfig, kind: int) -> list[Callable[[Image.Image], Image.Image]]:
    """The steps between flip and normalisation.

    Args:
        kind: 0 and 1 for the two global views, 2 for local ones.
    """
    from torchvision import transforms

    jitter = transforms.ColorJitter(*config.jitter)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        transforms.RandomApply([jitter], config.jitter_probability),
        transforms.RandomGrayscale(config.grey_probability),
        RandomBlur(config.blur_probability[kind], config.blur_radius),
    ]
    if config.solarise_probability[kind] > 0.0:
        steps.append(RandomSolarise(config.solarise_probability[kind]))
    return steps


def _view(config: CropsConfig, kind: int) -> Chain:
    local = kind == 2
    size, scale = (
        (config.local_size, config.local_scale) if local else (config.global_size, config.global_scale)
    )
    return Chain(
        [
            RandomResizedCrop(size, scale, config.crop_ratio, config.interpolation),
            RandomFlip(config.flip_probability),
            OnPillow(InTurn(pillow_steps(config, kind))),
            Normalise(config.mean, config.std),
        ]
    )
