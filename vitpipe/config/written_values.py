"""Fit the scalars of a YAML text to the kind of field that they are given for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vitpipe.config.yaml_core import WrittenFloat, WrittenInt, plain

# No seed, size in bytes or number of steps comes near it, and products of two such numbers stay finite.
_LARGEST = 10**36


def as_field(value: Any, annotation: Any) -> Any:
    """The value as a field of this type takes it.

    A number that is given for a text is its text as written, `0123456` or `12e4567` for a revision.

    Raises:
        ValueError: true or false for a number, which pydantic would take for 1 or 0; a number that is too
            large to compute with.
    """
    kinds = list(_kinds(annotation))
    if isinstance(value, bool):
        if _takes_numbers(kinds) and bool not in kinds and Any not in kinds:
            raise ValueError(f"{str(value).lower()} is no number")
        return value
    if isinstance(value, int | float) and _takes_numbers(kinds) and _LARGEST < abs(value) < math.inf:
        raise ValueError("a number beyond 1e36 is a mistake")
    if isinstance(value, WrittenInt | WrittenFloat):
        is_text = not _takes_numbers(kinds) and any(_is_text(kind) for kind in kinds)
        return value.written if is_text else plain(value)
    if isinstance(value, list | tuple):
        for kind in kinds:
            if get_origin(kind) in (tuple, list):
                return _as_items(value, get_args(kind))
        return plain(value)
    if isinstance(value, dict):
        for kind in kinds:
            if get_origin(kind) is dict:
                return {key: as_field(item, get_args(kind)[1]) for key, item in value.items()}
        # A section fits its own fields; whatever else takes a mapping gets plain values.
        return value if any(hasattr(kind, "model_fields") for kind in kinds) else plain(value)
    return value


def _as_items(values: Any, kinds: tuple[Any, ...]) -> list[Any]:
    """The items of a list for `tuple[X, ...]`, `list[X]` or `tuple[X, Y]`."""
    kinds = tuple(kind for kind in kinds if kind is not Ellipsis)
    # A list that is too long is refused by pydantic, with its own message.
    return [as_field(value, kinds[min(place, len(kinds) - 1)]) for place, value in enumerate(values)]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, without what is annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif origin is Literal:
        yield from {type(choice) for choice in get_args(annotation)}
    else:
        yield annotation


def _takes_numbers(kinds: list[Any]) -> bool:
    return int in kinds or float in kinds


def _is_text(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, str | Path)
