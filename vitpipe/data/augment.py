"""From a decoded image to a normalised tensor, for training and evaluation.

Recipes use timm's names and values. Random draws and pixels are bit-identical to those of timm's and
torchvision's transforms. Transforms draw from the global generators, which `batches` seeds for every sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.protocol import short_side
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
# Largest translation of RandAugment as a share of the image side (timm's `transforms_imagenet_train`).
_TRANSLATE_RATIO = 0.45
# Number of draws before the central crop is taken, as in timm and torchvision. Another number would shift
# every later draw of the sample.
_BOX_ATTEMPTS = 10


class Chain:
    """Applies transforms one after the other.

    Args:
        steps: the first takes an RGB image, the last returns a (3, H, W) float32 tensor.
    """

    def __init__(self, steps: Sequence[Callable[..., object]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """RGB image -> (3, H, W) float32.

        Args:
            out: (3, H, W) float32, one image of a batch, to write the result into; a new tensor without it.
        """
        value: Any = image
        for step in self.steps:
            # Normalise writes straight into the batch. Random erasing may follow it and works in place.
            value = step(value, out) if isinstance(step, Normalise) else step(value)
        assert isinstance(value, Tensor)
        # A last step that returns a new tensor instead of `out` costs one copy.
        return value if out is None or value is out else out.copy_(value)


class RandomResizedCrop:
    """Random crop, resized to a square; same draws as timm's `RandomResizedCropAndInterpolation`.

    Args:
        size: side of the result in pixels.
        scale: range of the crop's area as a share of the image's.
        ratio: range of width over height.
        interpolation: `bicubic` or `bilinear`.
    """

    def __init__(
        self, size: int, scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio
        self.resampling = RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> PackedPixels:
        """RGB image -> (size, size) packed pixels."""
        box = random_box(image.width, image.height, self.scale, self.ratio)
        return resized_crop(image, box, (self.size, self.size), self.resampling)


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draw a crop box: area uniform over `scale`, aspect ratio log-uniform over `ratio`.

    Inception's crop (Szegedy et al., arXiv 1409.4842, section 6) with the draws of timm's
    `RandomResizedCropAndInterpolation`.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        scale: range of the crop's area as a share of the image's.
        ratio: range of width over height.

    Returns:
        left, upper, right, lower in pixels.
    """
    # A copy of timm's arithmetic and not a call: importing timm takes 2 s, because it imports all its
    # networks. A test compares boxes and the state of the generator afterwards.
    logarithms = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_BOX_ATTEMPTS):
        # The order of the four draws (area, aspect, top, left) is timm's and must stay.
        area = random.uniform(*scale) * (width * height)
        aspect = math.exp(random.uniform(*logarithms))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if across <= width and down <= height:
            top, left = random.randint(0, height - down), random.randint(0, width - across)
            return left, top, left + across, top + down
    # No box fitted, for example in a panorama: the largest central crop whose aspect ratio is in the range.
    aspect = min(max(width / height, min(ratio)), max(ratio))
    across = width if aspect >= width / height else round(height * aspect)
    down = height if aspect <= width / height else round(width / aspect)
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


class RandomFlip:
    """Horizontal flip with a probability; same draws as torchvision's `RandomHorizontalFlip`."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels: PackedPixels) -> PackedPixels:
        """(H, W) packed pixels -> the same, or a flipped view of them."""
        # A view with a negative stride, not a copy: the normalising loop is compiled for both layouts.
        return pixels[:, ::-1] if torch.rand(1) < self.probability else pixels


class OnPillow:
    """Adapter for a transform of Pillow images, such as RandAugment, between transforms of packed pixels."""

    def __init__(self, step: Callable[[Image.Image], Image.Image]) -> None:
        self.step = step

    def __call__(self, pixels: PackedPixels) -> PackedPixels:
        """(H, W) packed pixels -> packed pixels, not necessarily of the same size."""
        return packed(self.step(unpacked(pixels)))


class Normalise:
    """Packed pixels to (3, H, W) float32: `(value / 255 - mean) / std`, rounded as by torchvision.

    Args:
        mean: per colour channel, in [0, 1].
        std: per colour channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        # 8-bit input has 256 values per channel, so the two divisions become one table look-up.
        self.table = normalising_table(tuple(mean), tuple(std))
        # Every chain has this step, so the compiled loops are loaded before loader processes are forked.
        kernels()

    def __call__(self, pixels: PackedPixels, out: Tensor | None = None) -> Tensor:
        """(H, W) packed pixels -> (3, H, W) float32; returns `out` if it is given."""
        if out is None:
            return torch.from_numpy(normalised(pixels, self.table))
        normalised(pixels, self.table, out.numpy())
        return out


class CentreCrop:
    """Resize the shorter side to `resize` pixels, then crop the central square of `size` pixels."""

    def __init__(self, resize: int, size: int, interpolation: str = "bicubic") -> None:
        self.resize, self.size, self.resampling = resize, size, RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> PackedPixels:
        """RGB image -> (size, size) packed pixels."""
        pixels, short = packed(image), min(image.size)
        if short != self.resize:
            # Truncated, as in torchvision's `Resize`; rounding the longer side would shift the crop by a
            # pixel in some images.
            width, height = (int(self.resize * side / short) for side in image.size)
            pixels = resized(pixels, (width, height), self.resampling)
        # Python's rounding to even, as in torchvision's `CenterCrop`.
        top, left = (round((side - self.size) / 2.0) for side in pixels.shape)
        return pixels[top : top + self.size, left : left + self.size]


def train_transform(augment: AugmentConfig, image_size: int) -> Transform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, random erasing; timm's order.

    Args:
        augment: values of the recipe.
        image_size: side of the result in pixels.

    Raises:
        RecipeError: when timm cannot parse `rand_augment`.
    """
    crop = RandomResizedCrop(image_size, augment.crop_scale, augment.crop_ratio, augment.interpolation)
    steps: list[Callable[..., object]] = [crop]
    if augment.flip_probability > 0.0:
        steps.append(RandomFlip(augment.flip_probability))
    if augment.rand_augment is not None:
        steps.append(OnPillow(_rand_augment(augment, image_size)))
    # timm drops colour jitter when RandAugment is on (`force_color_jitter` is off by default).
    elif augment.color_jitter > 0.0:
        from torchvision import transforms

        # Brightness, contrast, saturation; timm applies a scalar without hue.
        steps.append(OnPillow(transforms.ColorJitter(*[augment.color_jitter] * 3)))
    # Erasing comes after normalisation: its noise has mean 0 and std 1 per pixel, like the pixels by then.
    steps.append(Normalise(augment.mean, augment.std))
    if augment.erase_probability > 0.0:
        # Imported here: timm imports all its networks, about a second for a stage that needs none of it.
        from timm.data.random_erasing import RandomErasing

        steps.append(RandomErasing(augment.erase_probability, mode="pixel", device="cpu"))
    return Chain(steps)


def eval_transform(image_size: int, crop_ratio: float, augment: AugmentConfig) -> Transform:
    """Resize the shorter side to `image_size / crop_ratio`, centre crop, normalise.

    Args:
        image_size: side of the crop in pixels.
        crop_ratio: side of the crop over the resized shorter side, for example 224 / 256.
        augment: interpolation, mean and std, the same as in training.
    """
    crop = CentreCrop(short_side(image_size, crop_ratio), image_size, augment.interpolation)
    return Chain([crop, Normalise(augment.mean, augment.std)])


def _rand_augment(augment: AugmentConfig, image_size: int) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    parameters = {
        # The parameters and roundings with which timm's `transforms_imagenet_train` calls it.
        "translate_const": int(image_size * _TRANSLATE_RATIO),
        "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
        "interpolation": RESAMPLING[augment.interpolation],
    }
    try:
        step: Callable[[Image.Image], Image.Image] = rand_augment_transform(
            str(augment.rand_augment), parameters
        )
        return step
    # timm has no error of its own: it asserts the prefix, converts numbers and looks operations up.
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(
            f"'{augment.rand_augment}' is not a RandAugment policy in timm's notation",
            where="augment.rand_augment",
            fix="write it like rand-m9-mstd0.5-inc1",
        ) from error
