"""Pictures that stages have drawn, embedded into the page with their size and what they say of themselves."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitpipe.contracts.artifact import Artifact
from vitpipe.data.image_grid import note_of
from vitpipe.report.data_lineage import duplicate_pictures

_SUFFIXES = (".png", ".gif")
_MAX_PNG_BYTES = 900_000  # base64 adds a third; photographs are several times smaller as JPEG


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        anchor: its id on the page, by which it opens large.
        note: what it shows, as the stage that drew it says; empty for runs of earlier versions.
        uri: the picture itself as a data URI.
    """

    anchor: str
    title: str
    note: str
    uri: str
    width: int
    height: int


def pictures_of(artifact: Artifact, anchor: str) -> list[Picture]:
    """The pictures in a stage's folder, and the near duplicates of its datasets.

    Args:
        anchor: prefix of their ids.
    """
    drawn = sorted(file for file in artifact.path.iterdir() if file.suffix in _SUFFIXES)
    files = [(_title(file), file) for file in drawn]
    files += duplicate_pictures(artifact)
    found = []
    for number, (title, file) in enumerate(files):
        # A picture that somebody has damaged is not worth the page with all results.
        with suppress(OSError, SyntaxError, ValueError), Image.open(file) as picture:
            about = (note_of(file), data_uri(file), *picture.size)
            found.append(Picture(f"{anchor}-p{number}", title, *about))
    return found


def data_uri(picture: Path) -> str:
    """A picture as a data URI (RFC 2397); a PNG of more than 0.9 MB is converted to JPEG."""
    content, kind = picture.read_bytes(), picture.suffix.removeprefix(".")
    # An animation would lose all frames but one.
    if kind == "png" and len(content) > _MAX_PNG_BYTES:
        buffer = io.BytesIO()
        with Image.open(picture) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=88, optimize=True)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _title(file: Path) -> str:
    text = file.stem.replace("_", " ")
    return text[:1].upper() + text[1:]
