"""Photographic textures: images in scikit-image's wheel, cropped and tinted.

Only files inside the installed package are opened, never `skimage.data`, which may download.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.datasets.bundled import bundled_file


@dataclass(frozen=True)
class Texture:
    """A named region of an image.

    Attributes:
        picture: file name inside `skimage/data`.
        box: left, top, right, bottom of the homogeneous part, in pixels.
        tint: factor on red, green and blue.
        scale: range of source pixels per output pixel.
    """

    name: str
    picture: str
    box: tuple[int, int, int, int]
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: tuple[float, float] = (0.8, 1.6)


# In the order of the background classes of the ADE20K-like set: a change renumbers its labels. Four of
# the images are grey; a fixed tint (green grass, red brick) makes colour informative, as it is in
# photographs.
TEXTURES: tuple[Texture, ...] = (
    Texture("grass", "grass.png", (0, 0, 512, 512), (0.72, 1.0, 0.45)),
    Texture("gravel", "gravel.png", (0, 0, 512, 512), (0.95, 0.97, 1.08), (1.0, 2.0)),
    Texture("brick", "brick.png", (0, 0, 512, 512), (1.3, 0.72, 0.56), (1.2, 2.4)),
    Texture("sand", "moon.png", (0, 150, 512, 512), (1.35, 1.15, 0.85), (0.7, 1.4)),
    Texture("fur", "chelsea.png", (95, 0, 335, 235), (1.0, 1.0, 1.0), (0.7, 1.2)),
    Texture("stars", "hubble_deep_field.jpg", (0, 0, 1000, 872), (1.0, 1.0, 1.1), (1.0, 2.2)),
    Texture("tissue", "ihc.png", (0, 0, 512, 512), (1.0, 1.0, 1.0), (0.8, 1.8)),
    Texture("retina", "retina.jpg", (330, 330, 1080, 1080), (1.0, 1.0, 1.0), (1.2, 3.0)),
)
# Whole scenes, for the backgrounds of classification only: cluttered, as those of ImageNet are.
CLUTTER: tuple[Texture, ...] = (
    Texture("garage", "motorcycle_left.png", (0, 0, 741, 500), scale=(1.5, 4.0)),
    Texture("table", "coffee.png", (0, 0, 600, 400), scale=(1.5, 4.0)),
    Texture("launch pad", "rocket.jpg", (0, 0, 640, 427), scale=(1.5, 4.0)),
    Texture("portrait", "astronaut.png", (0, 0, 512, 512), scale=(1.5, 4.0)),
)
# Round objects without a class, for label 0 of the ADE20K-like set. Centres and radius in pixels of
# coins.png, which has two dozen coins; these ten were selected.
COIN_PICTURE, COIN_RADIUS = "coins.png", 18
COIN_CENTRES: tuple[tuple[int, int], ...] = (
    (45, 125), (205, 125), (336, 124), (102, 126), (274, 194), (102, 196), (44, 198), (154, 198), (114, 266),
    (358, 268),
)  # fmt: skip
# Factors on the brightness: under-exposed, so that bright digits stand out from every texture.
_EXPOSURE = (0.4, 0.75)
_COIN_TINT = (0.9, 0.78, 0.48)


def crop_texture(
    texture: Texture, width: int, height: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """A random crop of the texture, (height, width, 3) in [0, 1], with random scale, flip and exposure."""
    picture = _picture(texture.picture)
    left, top, right, bottom = texture.box
    # A crop never exceeds the homogeneous box, even if the scale must be below its range.
    room = min((right - left) / width, (bottom - top) / height)
    scale = min(room, generator.uniform(*texture.scale))
    x = generator.uniform(left, right - width * scale)
    y = generator.uniform(top, bottom - height * scale)
    box = (x, y, x + width * scale, y + height * scale)
    cut = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box))
    if generator.random() < 0.5:
        cut = cut[:, ::-1]
    exposure = np.float32(generator.uniform(*_EXPOSURE) / 255.0)
    return np.clip(cut * (np.asarray(texture.tint, np.float32) * exposure), 0.0, 1.0)


def crop_coin(
    diameter: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A coin: colour (d, d, 3) and coverage (d, d), both in [0, 1]; `diameter` d in pixels."""
    x, y = COIN_CENTRES[generator.integers(len(COIN_CENTRES))]
    box = (x - COIN_RADIUS, y - COIN_RADIUS, x + COIN_RADIUS, y + COIN_RADIUS)
    size = (diameter, diameter)
    colour = np.asarray(_picture(COIN_PICTURE).resize(size, Image.Resampling.BICUBIC, box)) / np.float32(
        255.0
    )
    # Coverage falls from 1 to 0 over one pixel at the edge of the disc (anti-aliasing).
    away = (np.arange(diameter) - (diameter - 1) / 2) ** 2
    distance = np.sqrt(away[:, None] + away[None, :])
    cover = np.clip(diameter / 2 - distance, 0.0, 1.0).astype(np.float32)
    return np.clip(colour * np.asarray(_COIN_TINT, np.float32), 0.0, 1.0), cover


@functools.cache
def _picture(name: str) -> Image.Image:
    """An image of the installed scikit-image, as RGB; decoded once."""
    with Image.open(bundled_file("skimage", f"data/{name}")) as picture:
        return picture.convert("RGB")
