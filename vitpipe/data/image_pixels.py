"""From the bytes of an image file to RGB pixels: one rule for packing, training, drawing and serving.

Published training code opens a file with Pillow and calls `convert("RGB")`. What that call reads correctly
is read by it: palettes, CMYK and transparency; EXIF rotation is ignored. More than 8 bits per value, which
it clips to white or black, become 8 bits by `eight_bits`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from vitpipe.config.data import DataConfig
from vitpipe.data.manifest import Encoding

# Pillow's modes with more than 8 bits per value: 32-bit integers, 16-bit in several byte orders, floats.
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
# Chunks that a PNG's pixels depend on; the others are profiles, texts, times (PNG specification, chapter 11).
_PNG_START, _PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """An image file, not yet decoded; Pillow will pass it to the decoder at once.

    Raises:
        DecompressionBombError: more than 89 megapixels, `Image.MAX_IMAGE_PIXELS`.
        OSError, SyntaxError, ValueError and others: Pillow's, for bytes that it does not recognise.
    """
    with Image.open(io.BytesIO(content)) as picture:
        # Pillow only warns between its limit and twice that, where it raises.
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError(
                f"{picture.width}x{picture.height} pixels, could be a decompression bomb"
            )
        # Pillow feeds its decoder blocks of 64 kB (`ImageFile.MAXBLOCK`); so read, a JPEG takes a sixth
        # longer.
        if isinstance(picture, ImageFile.ImageFile):
            picture.decodermaxblock = max(picture.decodermaxblock, len(content))
        yield picture


def is_wide(picture: Image.Image) -> bool:
    """Whether a picture has more than 8 bits per value."""
    return picture.mode in _WIDE_MODES


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits; any other picture as it is.

    16-bit values become their upper byte, whatever the image holds, so that the images of a set keep their
    relative brightness. Floats and 32-bit integers have no full scale: the range of the image's finite values
    becomes 0 to 255, values that are not finite become 0.
    """
    if not is_wide(picture):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.max(initial=0) > 0xFFFF or values.min(initial=0) < 0:
        finite = np.where(np.isfinite(values), values, np.nan)
        low, high = (
            (0.0, 0.0) if np.isnan(finite).all() else (float(np.nanmin(finite)), float(np.nanmax(finite)))
        )
        scaled = (finite - low) * (255.0 / max(high - low, 1e-12))
        return Image.fromarray(np.nan_to_num(scaled).astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, decoded. Raises as Pillow for damaged data."""
    picture.load()
    narrow = eight_bits(picture)
    return narrow if narrow.mode == "RGB" else narrow.convert("RGB")


def rgb_file(path: Path | str) -> Image.Image:
    """A file's picture as RGB. Raises as Pillow for what is no picture."""
    with Image.open(path) as picture:
        return as_rgb(picture)


def png_pixels(content: bytes) -> bytes:
    """A PNG with only the chunks that its pixels depend on; empty if it has no others, or is no PNG."""
    if not content.startswith(_PNG_START):
        return b""
    kept, place = bytearray(_PNG_START), len(_PNG_START)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] in _PNG_CHUNKS:
            kept += content[place:end]
        place = end
    return bytes(kept) if len(kept) < len(content) else b""


def encoding_of(data: DataConfig) -> Encoding | None:
    """How `data.short_side` reduces images; None where they keep their size."""
    return Encoding(short_side=data.short_side, quality=data.jpeg_quality) if data.short_side else None


def resized(picture: Image.Image, encoding: Encoding) -> bytes:
    """The image as JPEG, resized to `encoding.short_side`. The caller never passes a smaller image."""
    ratio = encoding.short_side / min(picture.size)
    width, height = (max(encoding.short_side, round(side * ratio)) for side in picture.size)
    buffer = io.BytesIO()
    reduced = as_rgb(picture).resize((width, height), Image.Resampling.BICUBIC)
    reduced.save(buffer, "JPEG", quality=encoding.quality)
    return buffer.getvalue()


def as_packed(content: bytes, encoding: Encoding | None = None) -> Image.Image:
    """The RGB pixels that an image file has after `prepare` has packed it and training has read it.

    Args:
        content: bytes of the file.
        encoding: with which the set was packed.

    Raises:
        OSError, SyntaxError, ValueError and others: Pillow's, for what `prepare` leaves out.
    """
    try:
        return _as_packed(content, encoding)
    except Exception:
        # A damaged profile or text of a PNG: without it every program reads the image.
        if not (pixels := png_pixels(content)):
            raise
        return _as_packed(pixels, encoding)


def _as_packed(content: bytes, encoding: Encoding | None) -> Image.Image:
    with opened(content) as picture:
        whole = as_rgb(picture)
    if encoding is None or min(whole.size) <= encoding.short_side:
        return whole
    with opened(resized(whole, encoding)) as reduced:
        return as_rgb(reduced)
