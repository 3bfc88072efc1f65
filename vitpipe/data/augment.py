"""From a decoded image to a normalised tensor, for training and for measuring.

The recipe's strings and numbers are timm's; the pieces are timm's and torchvision's. They draw from the
global generators, which `batches` seeds for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.recipe import AugmentConfig
from vitpipe.errors import RecipeError

Transform = Callable[[Image.Image], Tensor]
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Share of the image side by which RandAugment moves it at most (timm).
_TRANSLATE_SHARE = 0.45


class Chain:
    """Calls each step on the result of the one before."""

    def __init__(self, steps: Sequence[Callable[..., object]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image in, (3, H, W) float32 out."""
        value: object = image
        for step in self.steps:
            value = step(value)
        assert isinstance(value, Tensor)
        return value


class Normalise:
    """uint8 RGB image to (3, H, W) float32: `(value / 255 - mean) / std` per channel, in place.

    The same floats as torchvision's ToTensor and Normalize, in a third of the time for small images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        """(H, W) RGB image in, (3, H, W) out."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        values = torch.empty(pixels.shape).copy_(pixels)
        return values.div_(255).sub_(self.mean).div_(self.std)


class CentreCrop:
    """Resize the shorter side to `resize`, then cut the central square of `size` pixels."""

    def __init__(self, resize: int, size: int, interpolation: str = "bicubic") -> None:
        self.resize, self.size, self.resampling = resize, size, _RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Any RGB image in, a (size, size) image out; the rounding is torchvision's."""
        short = min(image.size)
        if short != self.resize:
            width, height = (int(self.resize * side / short) for side in image.size)
            image = image.resize((width, height), self.resampling)
        left, top = (round((side - self.size) / 2.0) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


def train_transform(augment: AugmentConfig, image_size: int) -> Transform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, erasing; in timm's order.

    Args:
        augment: as in the recipe; colour jitter is left out when RandAugment is on, as timm does.
        image_size: side of the result in pixels.

    Raises:
        RecipeError: when `rand_augment` is not a string that timm understands.
    """
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    steps: list[Callable[..., object]] = [
        RandomResizedCropAndInterpolation(
            image_size,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            interpolation=augment.interpolation,
        )
    ]
    if augment.flip_probability > 0.0:
        steps.append(transforms.RandomHorizontalFlip(augment.flip_probability))
    if augment.rand_augment is not None:
        steps.append(_rand_augment(augment, image_size))
    elif augment.color_jitter > 0.0:
        steps.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
    steps.append(Normalise(augment.mean, augment.std))
    if augment.erase_probability > 0.0:
        steps.append(RandomErasing(augment.erase_probability, mode="pixel", device="cpu"))
    return Chain(steps)


def eval_transform(image_size: int, crop_ratio: float, augment: AugmentConfig) -> Transform:
    """Shorter side to `image_size / crop_ratio`, centre crop, normalisation.

    Args:
        crop_ratio: side of the crop over the resized shorter side, for example 224 / 256.
        augment: gives interpolation, mean and std, so that training and measuring agree.
    """
    resize = int(image_size / crop_ratio)
    crop = CentreCrop(resize, image_size, augment.interpolation)
    return Chain([crop, Normalise(augment.mean, augment.std)])


def _rand_augment(augment: AugmentConfig, image_size: int) -> Callable[..., object]:
    from timm.data.auto_augment import rand_augment_transform

    parameters = {
        "translate_const": int(image_size * _TRANSLATE_SHARE),
        "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
        "interpolation": _RESAMPLING[augment.interpolation],
    }
    try:
        return rand_augment_transform(str(augment.rand_augment), parameters)
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(
            f"'{augment.rand_augment}' is not a RandAugment string",
            where="augment.rand_augment",
            mend="write it as timm does, for example rand-m9-mstd0.5-inc1",
        ) from error
