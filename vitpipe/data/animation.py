"""Short animations as GIF files, which browsers, the report and MLflow show without a player."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitpipe.contracts.errors import disk_errors
from vitpipe.data.image_grid import Pixels

_FONT, _MARGIN = 12, 4
_NUM_COLOURS = 255


def captioned(image: Pixels, text: str) -> Pixels:
    """An image (H, W, 3) with a text at its upper left, white with a black outline."""
    picture = Image.fromarray(image)
    font = ImageFont.load_default(_FONT)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), text, "white", font=font, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def write_animation(path: Path, frames: Sequence[Pixels], *, frame_ms: int, note: str = "") -> None:
    """Write frames of one size as a GIF that repeats for ever.

    Args:
        frame_ms: milliseconds per frame; browsers keep to multiples of 10 from 20 on.
        note: what it shows; kept in the file, see `image_grid.note_of`.

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    # One palette for all: a palette per frame flickers and doubles the file, as dithering does.
    some = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])
    palette, plain = Image.fromarray(some).quantize(_NUM_COLOURS), Image.Dither.NONE
    pages = [Image.fromarray(frame).quantize(palette=palette, dither=plain) for frame in frames]
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(
            path,
            "GIF",
            save_all=True,
            append_images=pages[1:],
            duration=frame_ms,
            loop=0,
            comment=note.encode(),
        )
