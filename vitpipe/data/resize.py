"""Crop, resize and normalise by compiled loops: bit-identical to Pillow, three times as fast.

Pixels are packed in 32 bits (red, green, blue, unused), as in Pillow's own memory. Tests compare every size,
filter and border with Pillow.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PackedPixels = NDArray[np.uint32]
# left, upper, right, lower in whole pixels, as in Pillow's `crop`
Box = tuple[int, int, int, int]
# Half width of the filter kernels in input pixels at scale 1 (Pillow, Resample.c). Only the filters that
# recipes allow are compiled.
_SUPPORT = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


def packed(image: Image.Image) -> PackedPixels:
    """The pixels of an RGB image, (H, W) uint32; read-only."""
    # RGBX is Pillow's memory layout, so this is a plain copy; "RGB" would repack to 3 bytes per pixel.
    raw = image.tobytes("raw", "RGBX")
    return np.frombuffer(raw, np.uint32).reshape(image.height, image.width)


def unpacked(pixels: PackedPixels) -> Image.Image:
    """Packed pixels (H, W) as an RGB image."""
    size = (pixels.shape[1], pixels.shape[0])
    # A flipped or cropped array is a view, and Pillow takes contiguous memory only.
    return Image.frombytes("RGB", size, np.ascontiguousarray(pixels), "raw", "RGBX")


def resized_crop(
    image: Image.Image, box: Box, size: tuple[int, int], resampling: Image.Resampling
) -> PackedPixels:
    """The pixels of `image.crop(box).resize(size, resampling)`, (height, width) uint32.

    Args:
        image: RGB.
        box: part of the image in pixels.
        size: width and height of the result in pixels.
        resampling: bilinear or bicubic.
    """
    # Crop first: resampling must not read pixels outside the box, as timm's crop-then-resize does not
    # (Pillow's `resize(box=...)` would).
    whole = box == (0, 0, *image.size)
    pixels = packed(image if whole else image.crop(box))
    return resized(pixels, size, resampling)


def resized(pixels: PackedPixels, size: tuple[int, int], resampling: Image.Resampling) -> PackedPixels:
    """Packed pixels (H, W) in another size, as by Pillow's `resize`.

    Args:
        size: width and height of the result in pixels.
        resampling: bilinear or bicubic.
    """
    width, height = size
    support, compiled = _SUPPORT[resampling], kernels()
    # Width before height, and no pass for an unchanged side: each pass rounds to 8 bits, so another order
    # would give other pixels than Pillow.
    if width != pixels.shape[1]:
        pixels = compiled.resize_width(pixels, *compiled.weights_of(pixels.shape[1], width, support))
    if height != pixels.shape[0]:
        pixels = compiled.resize_height(pixels, *compiled.weights_of(pixels.shape[0], height, support))
    return pixels


def normalised(
    pixels: PackedPixels, table: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Packed pixels (H, W) to float32 (3, H, W) by a table of 256 values per colour channel.

    Args:
        table: (3, 256), from `normalising_table`.
        out: (3, H, W) to write into; a new array if not given.
    """
    values = np.empty((3, *pixels.shape), np.float32) if out is None else out
    kernels().apply_table(pixels, table, values)
    return values


def normalising_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """`(value / 255 - mean) / std` for every 8-bit value and colour channel, (3, 256) float32."""
    # Three float32 operations, each rounded, as in ToTensor and Normalize; one scale and one shift would
    # round differently.
    values = np.arange(256, dtype=np.float32) / np.float32(255.0)
    rows = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return np.stack(rows)


@functools.cache
def kernels() -> ModuleType:
    """The module of compiled loops, compiled for all array layouts in use.

    Call it before loader processes are forked, so that they share the compiled code.
    """
    # Imported here: numba takes a second, which stages that augment no images do not need.
    from vitpipe.data import resize_kernels

    resize_kernels.warm_up()
    return resize_kernels
