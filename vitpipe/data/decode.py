"""Images of a dataset as RGB, or an error that names the image. Needs no torch."""

from __future__ import annotations

from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.image_pixels import as_rgb, opened


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
        with opened(content) as picture:
            return as_rgb(picture)
    # Pillow's PNG reader raises SyntaxError for damaged chunks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"The image '{name}' cannot be decoded ({error})", where=where, fix=fix) from error
