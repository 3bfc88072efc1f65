"""JPEGs in class folders for benchmarks, cropped from the photographs that scikit-image installs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitpipe.contracts.seeds import generator_of
from vitpipe.datasets.bundled import bundled_file

# Photographs, because decoding time depends on content: noise and drawings compress differently.
_PHOTOGRAPHS = (
    "astronaut.png", "motorcycle_left.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png",
    "retina.jpg",
)  # fmt: skip
_NUM_CLASSES = 10


@dataclass(frozen=True)
class Photographs:
    """Number, size in pixels and JPEG quality of the images to write."""

    # At quality 96 the crops have 105 kB on average. ImageNet's training images have 115 (147.9 GB in
    # 1,281,167 files, the tar's padding included).
    number: int = 256
    width: int = 500
    height: int = 375
    quality: int = 96


def write(folder: Path, wanted: Photographs) -> int:
    """Write class folders of JPEGs; returns their total size in bytes.

    Crops are taken without resizing; a photograph smaller than the crop is enlarged until it fits.
    """
    sources = []
    for name in _PHOTOGRAPHS:
        with Image.open(bundled_file("skimage", f"data/{name}")) as opened:
            photograph = opened.convert("RGB")
        ratio = max(wanted.width / photograph.width, wanted.height / photograph.height, 1.0)
        size = (int(np.ceil(photograph.width * ratio)), int(np.ceil(photograph.height * ratio)))
        sources.append(photograph if ratio == 1.0 else photograph.resize(size, Image.Resampling.LANCZOS))
    num_bytes = 0
    for number in range(wanted.number):
        # Per image, so that more images do not change the first ones.
        draw = generator_of("photographs", number)
        source = sources[number % len(sources)]
        left = int(draw.integers(0, source.width - wanted.width + 1))
        top = int(draw.integers(0, source.height - wanted.height + 1))
        cut = source.crop((left, top, left + wanted.width, top + wanted.height))
        path = folder / f"class_{number % _NUM_CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=wanted.quality)
        num_bytes += path.stat().st_size
    return num_bytes
