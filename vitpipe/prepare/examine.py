"""What becomes of one image file on its way into a shard: kept, converted, made smaller, or left out.

Whatever published training code reads, stays as it is: it opens a file with Pillow and calls
`convert("RGB")`, so files in CMYK, palettes and with EXIF rotation are packed byte for byte and read the
same way. They are listed all the same. Only what that call would spoil is converted (16-bit grey, which it
clips to white), and only what cannot be decoded is left out.
"""

from __future__ import annotations

import io
import warnings
from pathlib import PurePath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vitpipe.data.manifest import Encoding
from vitpipe.data.shards import read_at_once

Treatment = Literal["", "kept", "converted", "left out"]
_ORIENTATION = 0x0112
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"), "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}  # fmt: skip
# JPEGs are decoded at an eighth of their size to find damage, but never below this for a hash.
_HASHED_SIDE = 64


class Examined(NamedTuple):
    """One image file as it goes on.

    Attributes:
        content: what is packed; empty when the image is left out.
        suffix: extension of the packed file with its dot; empty when the name's own is right.
        finding: what is odd about it, empty for most.
        treatment: what was done about that.
        hash: perceptual hash, 0 when none was asked for.
    """

    content: bytes
    suffix: str = ""
    finding: str = ""
    treatment: Treatment = ""
    hash: int = 0


def examine(content: bytes, name: str, *, encoding: Encoding | None = None, hashed: bool = False) -> Examined:
    """Decode a file, say what is odd about it, and give what is to be packed.

    Args:
        content: the file.
        name: its name, to notice one format under another's extension.
        encoding: make images with a longer short side smaller.
        hashed: also compute the perceptual hash.
    """
    if not content:
        return _left_out("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _examine(content, name, encoding, hashed)
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on bad bytes.
        return _left_out(" ".join(str(error).split())[:120] or type(error).__name__)


def _examine(content: bytes, name: str, encoding: Encoding | None, hashed: bool) -> Examined:
    with Image.open(io.BytesIO(content)) as picture:
        read_at_once(picture, content)
        finding = _oddity(picture, name)
        shrinks = encoding is not None and min(picture.size) > encoding.short_side
        if not shrinks:
            side = _HASHED_SIDE if hashed else 1
            picture.draft(None, (max(side, picture.width // 8), max(side, picture.height // 8)))
        picture.load()
        wide = picture.mode in _WIDE_MODES
        pixels: Image.Image = _eight_bits(picture) if wide else picture
        number = _hash(pixels) if hashed else 0
        if shrinks and encoding is not None:
            treatment: Treatment = "converted" if wide else "kept" if finding else ""
            return Examined(_smaller(pixels, encoding), ".jpeg", finding, treatment, number)
        if wide:
            return Examined(_as_png(pixels), ".png", finding, "converted", number)
    return Examined(content, "", finding, "kept" if finding else "", number)


def _oddity(picture: Image.Image, name: str) -> str:
    """The first that holds of what readers should know; empty for an ordinary image."""
    if picture.mode in _WIDE_MODES:
        return "more than 8 bits per value"
    if picture.mode in ("CMYK", "YCCK"):
        return "CMYK"
    if picture.getexif().get(_ORIENTATION, 1) not in (0, 1):
        return "rotated by EXIF"
    if getattr(picture, "is_animated", False):
        return "several frames"
    if picture.mode in ("P", "PA"):
        return "palette"
    if picture.mode in ("RGBA", "LA", "La", "RGBa"):
        return "transparency"
    suffix, kind = PurePath(name).suffix.lower(), picture.format or ""
    if suffix and suffix not in _SUFFIXES.get(kind, (suffix,)):
        return f"{kind} named {suffix}"
    return ""


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey with more than 8 bits as 8 bits: 16-bit files by their upper byte, others by their own range."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.max(initial=0) > 0xFFFF or values.min(initial=0) < 0:
        low, high = float(values.min()), float(values.max())
        return Image.fromarray(((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8) if values.max() > 255 else values.astype(np.uint8))


def _as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _smaller(picture: Image.Image, encoding: Encoding) -> bytes:
    """The image with its short side reduced, as JPEG; never enlarged."""
    ratio = encoding.short_side / min(picture.size)
    width, height = (max(encoding.short_side, round(side * ratio)) for side in picture.size)
    buffer = io.BytesIO()
    reduced = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    reduced.save(buffer, "JPEG", quality=encoding.quality)
    return buffer.getvalue()


def _hash(picture: Image.Image) -> int:
    from vitpipe.prepare.duplicates import perceptual_hash

    return perceptual_hash(picture)


def _left_out(reason: str) -> Examined:
    return Examined(b"", "", reason, "left out")
