"""Examine one image file before it is packed: keep, convert, resize, or leave out.

Published training code opens a file with Pillow and calls `convert("RGB")`. Whatever that call reads
correctly is packed byte for byte, including CMYK, palettes and EXIF rotation (which it ignores), and listed
as a finding. 16-bit grey, which the call clips to white, is converted; only undecodable files are left out.
"""

from __future__ import annotations

import io
import warnings
from pathlib import PurePath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vitpipe.contracts.errors import reason_of
from vitpipe.data.decode import read_at_once
from vitpipe.data.manifest import Encoding

Treatment = Literal["", "kept", "converted", "left out"]
_ORIENTATION = 0x0112  # EXIF tag `Orientation`; 1 is upright, 2 to 8 are turned or mirrored
NO_PICTURE = "no picture"
"""The finding of a file that is no image by its kind; it is left out and does not count as damaged."""
# Chunks that a PNG's pixels depend on; the others are profiles, texts, times (PNG specification, chapter 11).
_PNG_START, _PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Pillow's modes with more than 8 bits per value: 32-bit integers, 16-bit in several byte orders, floats.
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"), "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}  # fmt: skip
# The smallest side at which a JPEG is decoded when its perceptual hash is needed, in pixels.
_HASHED_SIDE = 64


class Examined(NamedTuple):
    """One examined image file.

    Attributes:
        content: the bytes to pack; empty if the image is left out.
        suffix: extension of the packed file, with its dot; empty to keep the extension of the name.
        finding: the anomaly; empty for an ordinary image.
        treatment: what was done about the anomaly.
        hash: 64-bit perceptual hash; 0 if not requested.
    """

    content: bytes
    suffix: str = ""
    finding: str = ""
    treatment: Treatment = ""
    hash: int = 0


def examine(content: bytes, name: str, *, encoding: Encoding | None = None, hashed: bool = False) -> Examined:
    """Decode an image file, find anomalies, and return the bytes to pack.

    Args:
        content: the bytes of the file.
        name: the file name, to detect a format under the extension of another.
        encoding: resize images whose short side is longer than its `short_side`.
        hashed: also compute the perceptual hash.
    """
    if not content:
        return _left_out("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which is a finding here
            # Pillow only warns between its limit (89 megapixels) and twice that, where it raises.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return _examine(content, name, encoding, hashed)
            except Exception:
                if not (pixels := _png_pixels(content)):
                    raise
                # A damaged profile or text: without it every program reads the image.
                found = _examine(pixels, name, encoding, hashed)
                return found._replace(finding="damaged profile or text", treatment="converted")
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on bad bytes.
        return _left_out(reason_of(error))


def _examine(content: bytes, name: str, encoding: Encoding | None, hashed: bool) -> Examined:
    with Image.open(io.BytesIO(content)) as picture:
        read_at_once(picture, content)
        finding = _anomaly(picture, name)
        resizes = encoding is not None and min(picture.size) > encoding.short_side
        if not resizes:
            # libjpeg decodes to 1/8 of the size much faster, but still reads all data, so damage is found.
            side = _HASHED_SIDE if hashed else 1
            picture.draft(None, (max(side, picture.width // 8), max(side, picture.height // 8)))
        picture.load()
        wide = picture.mode in _WIDE_MODES
        pixels: Image.Image = _eight_bits(picture) if wide else picture
        number = _hash(pixels) if hashed else 0
        if resizes and encoding is not None:
            treatment: Treatment = "converted" if wide else "kept" if finding else ""
            return Examined(_resized(pixels, encoding), ".jpeg", finding, treatment, number)
        if wide:
            return Examined(_as_png(pixels), ".png", finding, "converted", number)
    return Examined(content, "", finding, "kept" if finding else "", number)


def _anomaly(picture: Image.Image, name: str) -> str:
    """The first anomaly that applies; empty for an ordinary image."""
    if picture.mode in _WIDE_MODES:
        return "more than 8 bits per value"
    if picture.mode in ("CMYK", "YCCK"):
        return "CMYK"
    try:
        turned = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # as many classes of errors as there are ways to damage it
        return "EXIF data that cannot be read"
    if turned in range(2, 9):
        return "rotated by EXIF"
    if getattr(picture, "is_animated", False):
        return "several frames"
    if picture.mode in ("P", "PA"):
        return "palette"
    if picture.mode in ("RGBA", "LA", "La", "RGBa"):
        return "transparency"
    # Extensions of formats that are not in the table are accepted.
    suffix, kind = PurePath(name).suffix.lower(), picture.format or ""
    if suffix and suffix not in _SUFFIXES.get(kind, (suffix,)):
        return f"{kind} named {suffix}"
    return ""


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits.

    16-bit values become their upper byte, whatever the image holds, so that the images of a set keep their
    relative brightness. Floats and 32-bit integers have no full scale: the range of the image's finite values
    becomes 0 to 255, values that are not finite become 0.
    """
    values = np.asarray(picture)
    if picture.mode == "F" or values.max(initial=0) > 0xFFFF or values.min(initial=0) < 0:
        finite = np.where(np.isfinite(values), values, np.nan)
        low, high = (
            (0.0, 0.0) if np.isnan(finite).all() else (float(np.nanmin(finite)), float(np.nanmax(finite)))
        )
        scaled = (finite - low) * (255.0 / max(high - low, 1e-12))
        return Image.fromarray(np.nan_to_num(scaled).astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


def _png_pixels(content: bytes) -> bytes:
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


def _as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _resized(picture: Image.Image, encoding: Encoding) -> bytes:
    """The image as JPEG, resized to `encoding.short_side`. The caller never passes a smaller image."""
    ratio = encoding.short_side / min(picture.size)
    width, height = (max(encoding.short_side, round(side * ratio)) for side in picture.size)
    buffer = io.BytesIO()
    reduced = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    reduced.save(buffer, "JPEG", quality=encoding.quality)
    return buffer.getvalue()


def _hash(picture: Image.Image) -> int:
    # Imported here: only `data.near_duplicates` needs it, in every worker process.
    from vitpipe.prepare.duplicates import perceptual_hash

    return perceptual_hash(picture)


def _left_out(reason: str) -> Examined:
    return Examined(b"", "", reason, "left out")
