"""Predictions beside the truth, drawn for a person to look at. Images are (H, W, 3) uint8 arrays."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitpipe.contracts.errors import disk_errors

Pixels = NDArray[np.uint8]
_TILE = 256
_GAP = 6
_CAPTION = 16
_BLEND = 0.45
_GOLDEN_RATIO = 0.618034


@dataclass(frozen=True)
class DrawnObject:
    """Something to draw: class number, corners (x0, y0, x1, y1), mask (H, W), and a text."""

    label: int
    box: Sequence[float]
    mask: NDArray[np.bool_]
    text: str


def class_colours(num_classes: int) -> Pixels:
    """Colours that differ between neighbours, (K, 3) uint8: equal steps of the golden ratio in hue."""
    hues = [(number * _GOLDEN_RATIO) % 1.0 for number in range(num_classes)]
    values = [colorsys.hsv_to_rgb(hue, 0.75, 0.95 - 0.3 * (n % 2)) for n, hue in enumerate(hues)]
    return (np.array(values) * 255).astype(np.uint8)


def draw_objects(image: Pixels, objects: Sequence[DrawnObject], colours: Pixels) -> Pixels:
    """Masks as tints, boxes as frames with their texts; what comes first lies on top."""
    pixels = image.astype(np.float32)
    for thing in reversed(objects):
        tint = colours[thing.label].astype(np.float32)
        pixels[thing.mask] += _BLEND * (tint - pixels[thing.mask])
    # Drawn at the size at which it is shown, so that frames stay thin and texts readable.
    picture = _tile(pixels.astype(np.uint8))
    scale = _scale(image)
    pen = ImageDraw.Draw(picture)
    for thing in reversed(objects):
        colour = tuple(int(c) for c in colours[thing.label])
        x0, y0, x1, y1 = (scale * corner for corner in thing.box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=2)
        pen.text((x0 + 3, y0 + 2), thing.text, fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def draw_labels(image: Pixels, labels: NDArray[np.integer], colours: Pixels) -> Pixels:
    """A label map (H, W) as tints; labels without a colour (ignored) stay dark."""
    known = labels < len(colours)
    tints = np.where(known[..., None], colours[np.where(known, labels, 0)], 0)
    return (image * (1 - 2 * _BLEND / 1.5) + tints * (2 * _BLEND / 1.5)).astype(np.uint8)


def write_sheet(rows: Sequence[Sequence[Pixels]], captions: Sequence[str], path: Path) -> None:
    """Put rows of pictures below captions, one per column, and write a PNG.

    Raises:
        StorageError: when the disk refuses.
    """
    step = _TILE + _GAP
    sheet = Image.new("RGB", (step * len(captions) + _GAP, step * len(rows) + _GAP + _CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        pen.text((_GAP + column * step, 3), caption, fill="black")
        for row, pictures in enumerate(rows):
            sheet.paste(_tile(pictures[column]), (_GAP + column * step, _CAPTION + _GAP + row * step))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, optimize=True)


def _scale(image: Pixels) -> float:
    return _TILE / max(image.shape[:2])


def _tile(image: Pixels) -> Image.Image:
    height, width = image.shape[:2]
    scale = _scale(image)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
