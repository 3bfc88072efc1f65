"""Small JSON files of an outbox with a checksum in them, so that a damaged one is recognised."""

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
    """A file of an outbox is empty, cut short or altered."""


def checksum(values: Mapping[str, Any]) -> str:
    """CRC-32 of a JSON object, eight hex digits; it finds accidents, not forgeries."""
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def parse_checked(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text, its checksum verified and removed; older texts carry none.

    Raises:
        DamagedError: it is not a JSON object, or not the one that was written.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    if not isinstance(values, dict):
        raise DamagedError("not a JSON object")
    stored = values.pop(SUM, None)
    if stored is not None and stored != checksum(values):
        raise DamagedError("the checksum differs")
    return values


def write_checked(path: Path, model: BaseModel) -> None:
    """Write a model as JSON with its checksum, whole or not at all.

    Raises:
        StorageError: when the disk refuses.
    """
    values = model.model_dump(mode="json")
    write_whole(path, json.dumps({**values, SUM: checksum(values)}, indent=2) + "\n")


def read_checked(path: Path, kind: type[_Model]) -> _Model:
    """Read what `write_checked` wrote, or an older file without a checksum.

    Raises:
        OSError: there is no such file.
        DamagedError: it is not what was written.
    """
    values = parse_checked(path.read_bytes())
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise DamagedError(f"{error.error_count()} values are not what they should be") from error
