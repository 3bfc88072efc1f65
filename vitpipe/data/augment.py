"""From a decoded image to a normalised tensor, for training and for measuring.

The recipe's strings and numbers are timm's, and so are the draws: pixels equal those of timm's and
torchvision's chains to the last bit. Steps draw from the global generators, which `batches` seeds for every
sample. Cropping, resizing, flipping and normalising work on packed pixels (`resize`), three times as fast
as on Pillow's images; steps that need Pillow are wrapped by `OnPillow`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.recipe import AugmentConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.data.resize import (
    Box,
    PackedPixels,
    kernels,
    normalised,
    normalising_table,
    packed,
    resized,
    resized_crop,
    unpacked,
)

# One tensor, or one per view of multi-crop.
Transform = Callable[[Image.Image], Tensor | list[Tensor]]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Share of the image side by which RandAugment moves it at most (timm).
_TRANSLATE_SHARE = 0.45
_BOX_ATTEMPTS = 10  # timm's


class Chain:
    """Calls each step on the result of the one before."""

    def __init__(self, steps: Sequence[Callable[..., object]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """RGB image in, (3, H, W) float32 out; written into `out`, a part of a batch, where one is given."""
        value: Any = image
        for step in self.steps:
            value = step(value, out) if isinstance(step, Normalise) else step(value)
        assert isinstance(value, Tensor)
        return value if out is None or value is out else out.copy_(value)


class RandomResizedCrop:
    """Cut a random part out and resize it to a square; draws as timm's class of this name does.

    Args:
        size: side of the result in pixels.
        scale: range of the part's share of the image's area.
        ratio: range of width over height.
    """

    def __init__(
        self, size: int, scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio
        self.resampling = RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> PackedPixels:
        """RGB image in, (size, size) packed pixels out."""
        box = random_box(image.width, image.height, self.scale, self.ratio)
        return resized_crop(image, box, (self.size, self.size), self.resampling)


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """A part of an image, in pixels: area uniform over `scale`, aspect log-uniform over `ratio`.

    Inception's crop (Szegedy et al., arXiv 1409.4842, section 6) with the draws of timm's
    `RandomResizedCropAndInterpolation`, in its order; written out because timm takes 2 s to import.

    Args:
        width: of the image.
        height: likewise.
        scale: range of the part's share of the image's area.
        ratio: range of width over height.
    """
    logarithms = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_BOX_ATTEMPTS):
        area = random.uniform(*scale) * (width * height)
        aspect = math.exp(random.uniform(*logarithms))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if across <= width and down <= height:
            top, left = random.randint(0, height - down), random.randint(0, width - across)
            return left, top, left + across, top + down
    # The image is too long for the range: its largest central part that is in it.
    aspect = min(max(width / height, min(ratio)), max(ratio))
    across = width if aspect >= width / height else round(height * aspect)
    down = height if aspect <= width / height else round(width / aspect)
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


class RandomFlip:
    """Mirror left and right with a probability; draws as torchvision's RandomHorizontalFlip does."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels: PackedPixels) -> PackedPixels:
        """Packed pixels in and out; a mirrored result is a view."""
        return pixels[:, ::-1] if torch.rand(1) < self.probability else pixels


class OnPillow:
    """A step that works on Pillow's images, such as RandAugment, between steps on packed pixels."""

    def __init__(self, step: Callable[[Image.Image], Image.Image]) -> None:
        self.step = step

    def __call__(self, pixels: PackedPixels) -> PackedPixels:
        """Packed pixels in and out."""
        return packed(self.step(unpacked(pixels)))


class Normalise:
    """Packed pixels to (3, H, W) float32: `(value / 255 - mean) / std`, rounded as torchvision does."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.table = normalising_table(tuple(mean), tuple(std))
        kernels()

    def __call__(self, pixels: PackedPixels, out: Tensor | None = None) -> Tensor:
        """(H, W) packed pixels in, (3, H, W) out; `out` itself where one is given."""
        if out is None:
            return torch.from_numpy(normalised(pixels, self.table))
        normalised(pixels, self.table, out.numpy())
        return out


class CentreCrop:
    """Resize the shorter side to `resize`, then cut the central square of `size` pixels."""

    def __init__(self, resize: int, size: int, interpolation: str = "bicubic") -> None:
        self.resize, self.size, self.resampling = resize, size, RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> PackedPixels:
        """Any RGB image in, (size, size) packed pixels out; the rounding is torchvision's."""
        pixels, short = packed(image), min(image.size)
        if short != self.resize:
            width, height = (int(self.resize * side / short) for side in image.size)
            pixels = resized(pixels, (width, height), self.resampling)
        top, left = (round((side - self.size) / 2.0) for side in pixels.shape)
        return pixels[top : top + self.size, left : left + self.size]


def train_transform(augment: AugmentConfig, image_size: int) -> Transform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, erasing; in timm's order.

    Args:
        augment: as in the recipe; colour jitter is left out when RandAugment is on, as timm does.
        image_size: side of the result in pixels.

    Raises:
        RecipeError: when `rand_augment` is not a string that timm understands.
    """
    crop = RandomResizedCrop(image_size, augment.crop_scale, augment.crop_ratio, augment.interpolation)
    steps: list[Callable[..., object]] = [crop]
    if augment.flip_probability > 0.0:
        steps.append(RandomFlip(augment.flip_probability))
    if augment.rand_augment is not None:
        steps.append(OnPillow(_rand_augment(augment, image_size)))
    elif augment.color_jitter > 0.0:
        from torchvision import transforms

        steps.append(OnPillow(transforms.ColorJitter(*[augment.color_jitter] * 3)))
    steps.append(Normalise(augment.mean, augment.std))
    if augment.erase_probability > 0.0:
        from timm.data.random_erasing import RandomErasing

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


def _rand_augment(augment: AugmentConfig, image_size: int) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    parameters = {
        "translate_const": int(image_size * _TRANSLATE_SHARE),
        "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
        "interpolation": RESAMPLING[augment.interpolation],
    }
    try:
        step: Callable[[Image.Image], Image.Image] = rand_augment_transform(
            str(augment.rand_augment), parameters
        )
        return step
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(
            f"'{augment.rand_augment}' is not a RandAugment string",
            where="augment.rand_augment",
            fix="write it as timm does, for example rand-m9-mstd0.5-inc1",
        ) from error
