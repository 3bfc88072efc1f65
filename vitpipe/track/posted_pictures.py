"""What people post to a served model as a picture: a file in base64, a data URL, or bytes -> RGB pixels."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from numbers import Number
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from vitpipe.contracts.errors import InputError, reason_of, shortened
from vitpipe.contracts.units import counted

if TYPE_CHECKING:
    from PIL import Image

    from vitpipe.data.manifest import Encoding

_EXPECTED = "post a JPEG, PNG or WebP file in base64, or as a data URL (data:image/png;base64,...)"
_NAMED = 5  # wrong rows in one message


def pictures(values: Sequence[object], encoding: Encoding | None = None) -> list[Image.Image]:
    """The pictures of a request, with the pixels that training on the same files would have.

    Args:
        values: of the rows: bytes of image files, their base64, or data URLs.
        encoding: with which the model's data was packed.

    Raises:
        InputError: a value is no picture; the message names the rows.
    """
    # Pillow and NumPy are not needed to describe a model's columns.
    from vitpipe.data.image_pixels import as_packed

    if not values:
        raise InputError("The request has no rows", where="column 'image'", fix=_EXPECTED)
    found: list[Image.Image] = []
    mistakes: list[str] = []
    for row, value in enumerate(values, start=1):
        try:
            found.append(as_packed(_file_in(value), encoding))
        except _NoFileError as error:
            mistakes.append(f"Row {row}: {error}")
        except Exception as error:  # decoders raise errors of many classes on bad bytes
            mistakes.append(f"Row {row}: the bytes are no image that can be read ({reason_of(error)})")
    if mistakes:
        more = f"; and {len(mistakes) - _NAMED} more" if len(mistakes) > _NAMED else ""
        raise InputError(
            "; ".join(mistakes[:_NAMED]) + more,
            where=f"column 'image' of {counted(len(values), 'row')}",
            fix=_EXPECTED,
        )
    return found


class _NoFileError(Exception):
    """A value holds no bytes of a file; the message says what it is instead."""


def _file_in(value: object) -> bytes:
    """The bytes of the file that a value stands for."""
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
    elif isinstance(value, str):
        content = _decoded_text(value)
    else:
        raise _NoFileError(f"an image file in base64 is expected, found {_kind(value)}")
    if not content:
        raise _NoFileError("an image file in base64 is expected, found an empty text")
    return content


def _decoded_text(text: str) -> bytes:
    payload = text.strip()
    if payload[:5].lower() == "data:":
        head, comma, payload = payload.partition(",")
        if not comma:
            raise _NoFileError(f"the data URL '{shortened(text)}' has no comma before its data")
        content = unquote_to_bytes(payload)
        if not head.lower().replace(" ", "").endswith(";base64"):
            return content
        payload = content.decode("ascii", errors="replace")
    try:
        # Encoders break lines after 76 characters; anything else that is no base64 is a mistake.
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _NoFileError(
            f"the text '{shortened(text)}' is not base64: it has other characters than A-Z, a-z, 0-9, + "
            "and /, or its end is missing"
        ) from error


def _kind(value: object) -> str:
    """What a value is, in the terms of JSON."""
    # pandas writes null as None, NaN, or NA: the last two are not equal to themselves.
    if value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value):
        return "null"
    if isinstance(value, Number):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {shortened(value)}"
    if isinstance(value, Sequence):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
