"""Small JSON files of an outbox that hold a checksum, so that a damaged file is detected when it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vitpipe.contracts.files import write_whole

SUM = "sum"
_Model = TypeVar("_Model", bound=BaseModel)


class DamagedError(ValueError):
    """A file of an outbox is empty, truncated or altered."""


def checksum(values: Mapping[str, Any]) -> str:
    """CRC-32 of a JSON object, eight hex digits. It detects accidents, not forgeries."""
    # A parsed text gives the same checksum again: `json` keeps the order of keys, and its floats are the
    # shortest texts that are read back as the same number (NaN and Infinity included).
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def parse_checked(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object, verify its checksum and remove it.

    Raises:
        DamagedError: the text is not a JSON object, or its checksum differs.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    if not isinstance(values, dict):
        raise DamagedError("not a JSON object")
    # Outboxes written before checksums were added have none; they must still be sent.
    stored = values.pop(SUM, None)
    if stored is not None and stored != checksum(values):
        raise DamagedError("the checksum differs")
    return values


def write_checked(path: Path, model: BaseModel) -> None:
    """Write a model as JSON with its checksum; after a crash the file has the old or the new content.

    Raises:
        StorageError: the disk refuses the write.
    """
    values = model.model_dump(mode="json")
    write_whole(path, json.dumps({**values, SUM: checksum(values)}, indent=2) + "\n")


def read_checked(path: Path, kind: type[_Model]) -> _Model:
    """Read a file of `write_checked`, or an older file without a checksum.

    Raises:
        OSError: the file does not exist or cannot be read.
        DamagedError: the content is not what was written.
    """
    values = parse_checked(path.read_bytes())
    try:
        return kind.model_validate(values)
    # Without a checksum (older files), or with a bit flip in the key `sum` itself, the types still have to
    # fit.
    except ValidationError as error:
        raise DamagedError(f"{error.error_count()} invalid values") from error
