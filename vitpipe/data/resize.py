"""Pillow's resampling to the last bit, three times as fast: crop, resize and normalise, compiled.

Pixels are packed in 32 bits (red, green, blue, unused), as Pillow keeps them. Tests hold every size, filter
and border against Pillow itself.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PackedPixels = NDArray[np.uint32]
# left, upper, right, lower, in whole pixels
Box = tuple[int, int, int, int]
_SUPPORT = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


def packed(image: Image.Image) -> PackedPixels:
    """The pixels of an RGB image, (H, W) of 32 bits each."""
    raw = image.tobytes("raw", "RGBX")
    return np.frombuffer(raw, np.uint32).reshape(image.height, image.width)


def unpacked(pixels: PackedPixels) -> Image.Image:
    """The RGB image again, for steps that work on Pillow's images."""
    size = (pixels.shape[1], pixels.shape[0])
    return Image.frombytes("RGB", size, np.ascontiguousarray(pixels), "raw", "RGBX")


def resized_crop(
    image: Image.Image, box: Box, size: tuple[int, int], resampling: Image.Resampling
) -> PackedPixels:
    """What `image.crop(box).resize(size, resampling)` gives, packed.

    Args:
        image: RGB.
        size: width and height of the result in pixels.
        resampling: bilinear or bicubic.
    """
    whole = box == (0, 0, *image.size)
    pixels = packed(image if whole else image.crop(box))
    return resized(pixels, size, resampling)


def resized(pixels: PackedPixels, size: tuple[int, int], resampling: Image.Resampling) -> PackedPixels:
    """Packed pixels in another size, as Pillow's `resize` gives them.

    Args:
        size: width and height of the result in pixels.
    """
    width, height = size
    support, run = _SUPPORT[resampling], kernels()
    if width != pixels.shape[1]:
        pixels = run.across(pixels, *run.weights_of(pixels.shape[1], width, support))
    if height != pixels.shape[0]:
        pixels = run.down(pixels, *run.weights_of(pixels.shape[0], height, support))
    return pixels


def normalised(
    pixels: PackedPixels, table: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Packed pixels (H, W) to floats (3, H, W) by one table of 256 values per colour, (3, 256).

    Args:
        out: where to write them; a new array if not given.
    """
    values = np.empty((3, *pixels.shape), np.float32) if out is None else out
    kernels().look_up(pixels, table, values)
    return values


def normalising_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """`(value / 255 - mean) / std` for every value and colour, (3, 256), with torchvision's roundings."""
    values = np.arange(256, dtype=np.float32) / np.float32(255.0)
    rows = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return np.stack(rows)


@functools.cache
def kernels() -> ModuleType:
    """The compiled loops, ready to run. Call it before loader processes are forked: they share them then."""
    from vitpipe.data import resize_kernels

    resize_kernels.warm_up()
    return resize_kernels
