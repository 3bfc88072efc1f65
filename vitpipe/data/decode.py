"""Encoded images -> RGB, as the published training code reads them. Needs no torch."""

from __future__ import annotations

import io

from PIL import Image, ImageFile

from vitpipe.contracts.errors import DatasetError


def rgb_image(content: bytes, name: str, where: str, fix: str) -> Image.Image:
    """Decode an image file as RGB.

    Args:
        content: bytes of the file.
        name: of the image, for the message.
        where: it is read from, for the message.
        fix: what to do about an image that cannot be decoded.

    Raises:
        DatasetError: when it cannot be decoded; the message names the image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            read_at_once(image, content)
            image.load()
            # Palettes, CMYK and transparency are converted, EXIF rotation is ignored: that is how the
            # published training code reads images.
            return image if image.mode == "RGB" else image.convert("RGB")
    # Pillow's PNG reader raises SyntaxError for damaged chunks.
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"The image '{name}' cannot be decoded ({error})", where=where, fix=fix) from error


def read_at_once(image: Image.Image, content: bytes) -> None:
    """Let Pillow pass the whole file to the decoder at once.

    Args:
        image: opened and not yet loaded.
        content: bytes of the file.
    """
    # Pillow feeds its decoder blocks of 64 kB (`ImageFile.MAXBLOCK`); so read, a JPEG takes a sixth longer.
    if isinstance(image, ImageFile.ImageFile):
        image.decodermaxblock = max(image.decodermaxblock, len(content))
