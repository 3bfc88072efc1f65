"""All mistakes of a recipe as one sentence, each with its key and, where a word is close, what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vitpipe.config.model import known_options, options_of_others
from vitpipe.config.places import Places
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import shortened
from vitpipe.contracts.spelling import did_you_mean

# What is expected, in words instead of the names of Python's classes.
_EXPECTED = {
    "model_type": "keys and values are expected",
    "model_attributes_type": "keys and values are expected",
    "dict_type": "keys and values are expected",
    "mapping_type": "keys and values are expected",
    "tuple_type": "a list is expected",
    "list_type": "a list is expected",
    "set_type": "a list is expected",
    "string_type": "a text is expected",
}


def all_mistakes(error: ValidationError, values: Mapping[str, Any], places: Places) -> tuple[str, str]:
    """The mistakes that pydantic has found in a recipe with these values, and where they stand."""
    # `is_instance_of` a class of ours: a text that becomes one is the other choice, and has its own line.
    found = [_line(item, values) for item in error.errors() if item["type"] != "is_instance_of"]
    stands = [places.of(keys) if keys else places.named_in(line) for keys, line in found]
    different = list(dict.fromkeys(stands))
    lines = [
        f"{line} ({place})" if len(different) > 1 and place != places.recipe else line
        for (_, line), place in zip(found, stands, strict=True)
    ]
    count = f"{len(lines)} mistakes: " if len(lines) > 1 else ""
    return count + "; ".join(lines), "; ".join(different)


def remedy(error: ValidationError, values: Mapping[str, Any]) -> str:
    """How to take out options that only another family's networks have; empty when there are none."""
    # "Is not a known key" alone gives no way out where the recipe's own file has set them.
    others = options_of_others(known_options(values.get("model")))
    places = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
    found = [
        str(place[1]) for place in places if len(place) == 2 and place[0] == "model" and place[1] in others
    ]
    taken = ", ".join(f"model.{key}=null" for key in found)
    return f"take out what this network does not have: {taken}; " if found else ""


def _line(item: Any, values: Mapping[str, Any]) -> tuple[list[str], str]:
    """The keys that lead to a mistake, and what it is."""
    *above, last = item["loc"] or ("",)
    section, shown = _section_at(tuple(above), values)
    keys = [*shown, *_key(section, last)]
    path = ".".join(keys)
    if item["type"] == "extra_forbidden":
        known = _keys_of(section)
        keys = [*shown, str(last)]  # as given, brackets included
        return (
            keys,
            f"'{shortened('.'.join(keys))}' is not a known key{did_you_mean(str(last), known, known)}",
        )
    if item["type"] == "missing":
        return keys, f"'{path}' is missing"
    shown_value = "" if item["type"] == "value_error" else f" (given: {shortened(repr(item['input']))})"
    message = _EXPECTED.get(item["type"], item["msg"].removeprefix("Value error, "))
    return keys, f"'{path}': {message}{shown_value}" if path else message


def _keys_of(section: type[BaseModel]) -> dict[str, str]:
    """Key -> where it stands, for the keys of a section and of the sections in it."""
    keys = {name: name for name in section.model_fields}
    for name, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            keys = {key: f"{name}.{key}" for key in inner.model_fields} | keys
    return keys


def _section_at(
    location: tuple[int | str, ...], values: Mapping[str, Any]
) -> tuple[type[BaseModel], list[str]]:
    """The section at a location of validated models, and the keys that lead there."""
    section: type[BaseModel] = Recipe
    shown: list[str] = []
    if location[:1] == ("model",):
        # Its type depends on the network's name, see `model.model_config`.
        section, shown, location = known_options(values.get("model")), ["model"], location[1:]
    for part in location:
        field = section.model_fields.get(str(part))
        if field is not None:
            found = list(_sections_in(field.annotation))
            section = found[0] if found else section
            shown.append(str(part))
        else:
            shown += _key(section, part)
    return section, shown


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models of an annotation: `Section | None` and `tuple[Section, ...]` hide them one level down."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _key(section: type[BaseModel], part: int | str) -> list[str]:
    # Pydantic adds which kind it tried, `function-after[Address(), str]`; no key of ours has brackets.
    return [] if part == "" or "[" in str(part) else [str(part)]
