"""Read what users write as YAML 1.2, and keep a number's text for fields that are texts.

PyYAML reads YAML 1.1, where `off` is false, `1:40` is 100 and `0100` is 64. The core schema of YAML 1.2
(chapter 10.3) has no such scalars, and DVC reads params.yaml by it, too.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Self, TypeVar

import yaml
from yaml.parser import ParserError
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

from vitpipe.contracts.errors import shortened
from vitpipe.contracts.safe_yaml import SAFE_LOADER

# Python writes out integers of up to 4,300 decimal digits; hexadecimal ones become longer.
_MAX_DIGITS = 1000
# PyYAML looks for the colon behind a key no further (YAML 1.2, chapter 7.4.2, has the same limit).
_MAX_KEY_CHARACTERS = 1024
# No path, name or text of ours can hold NUL or half of a surrogate pair, which YAML lets escapes write.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# YAML ends lines by \n, \r, NEL, LS and PS; marks count them so.
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_AROUND_KEYS = re.compile(r"(:(?=\s|$)|[,{}\[\]])")


class _Written:
    """A number that remembers how it was written: `0123456` may be a revision, not 123,456."""

    written: str

    @classmethod
    def of(cls, number: Any, text: str) -> Self:
        """The number with its text."""
        made = cls(number)  # type: ignore[call-arg]  # int or float, see below
        made.written = text
        return made


class WrittenInt(_Written, int):
    """An integer of a YAML text."""


class WrittenFloat(_Written, float):
    """A floating-point number of a YAML text."""


class _CoreValues:
    """What is added to a safe loader of PyYAML: YAML 1.2's scalars; a key that stands twice is an error."""

    # PyYAML's own name: without it those of YAML 1.1 would be inherited.
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """The text of a scalar; refuses characters that no path and no UTF-8 file can hold."""
        text = super().construct_scalar(node)  # type: ignore[misc]  # of the loader beside it
        if isinstance(text, str) and (found := _NO_TEXT.search(text)):
            name = "NUL" if found[0] == "\0" else "half of a surrogate pair"
            raise yaml.MarkedYAMLError(
                problem=f"the character U+{ord(found[0]):04X} ({name}) is not allowed in '{shortened(text)}'",
                problem_mark=node.start_mark,
            )
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # A merge key brings the keys of other mappings, which those beside it replace.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[attr-defined]
            # Recipes have no other keys; a list cannot be one in Python.
            if isinstance(key, list | dict | set):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a single text, not a list", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return mapping


class _FastLoader(_CoreValues, SAFE_LOADER):  # type: ignore[misc, valid-type]
    """Reads what is right."""


class _ExactLoader(_CoreValues, yaml.SafeLoader):
    """Reads again what the other one refuses: its messages say more."""


_LOADERS = (_FastLoader, _ExactLoader)
_SCALARS = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+0123456789."),
    ),
    "merge": (r"(?:<<)", ["<"]),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _loader in _LOADERS:
        _loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^{_pattern}$"), _first)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenInt:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    if len(text) > _MAX_DIGITS:
        raise yaml.MarkedYAMLError(
            problem=f"the number '{shortened(text)}' has {len(text):,} digits, which is too long",
            problem_mark=node.start_mark,
        )
    try:
        # Not base 0, by which Python refuses leading zeros.
        return WrittenInt.of(int(text[2:] if base != 10 else text, base), text)
    except ValueError as error:  # of a text behind the tag !!int
        raise _no_number(node, text) from error


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenFloat:
    text = str(loader.construct_scalar(node))
    try:
        return WrittenFloat.of(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")), text)
    except ValueError as error:  # of a text behind the tag !!float
        raise _no_number(node, text) from error


def _no_number(node: yaml.ScalarNode, text: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"'{shortened(text)}' is no number", problem_mark=node.start_mark)


def _bool(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return str(loader.construct_scalar(node)).lower() == "true"


for _loader in _LOADERS:
    _loader.add_constructor("tag:yaml.org,2002:int", _int)
    _loader.add_constructor("tag:yaml.org,2002:float", _float)
    _loader.add_constructor("tag:yaml.org,2002:bool", _bool)


def read_yaml(text: str) -> Any:
    """One YAML document as plain values; numbers carry their text.

    Raises:
        yaml.YAMLError: when it is none, a key stands twice or is a list, is nested too deeply, or an anchor
            lies inside itself.
    """
    try:
        value = _loaded(text)
        _refuse_cycles(value, ())
        return value
    except ReaderError as error:
        raise _unprintable(error, text) from error
    except (ScannerError, ParserError) as error:
        raise _long_key(error, text) or error from error
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    # A tag of Python, a date that does not exist.
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


def _loaded(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_FastLoader)
    except (yaml.YAMLError, ValueError):
        return yaml.load(text, Loader=_ExactLoader)


def yaml_problem(error: yaml.YAMLError) -> tuple[str, int]:
    """What is wrong with a text that is no YAML, and on which line; 0 where that is not known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split()) or "not YAML"
    return problem, mark.line + 1 if mark else 0


def _long_key(error: yaml.MarkedYAMLError, text: str) -> yaml.YAMLError | None:
    """The error for a key beyond YAML's limit, of which PyYAML says that its colon is missing or too much."""
    marks = [mark for mark in (error.context_mark, error.problem_mark) if mark is not None]
    lines = _LINE_BREAK.split(text)
    for mark in (mark for mark in marks if mark.line < len(lines)):
        # What stands before each colon, back to the last comma or bracket.
        parts = _AROUND_KEYS.split(lines[mark.line])
        keys = [
            part.strip(" \t\"'") for part, end in zip(parts[::2], parts[1::2], strict=False) if end[0] == ":"
        ]
        for key in (key for key in keys if len(key) > _MAX_KEY_CHARACTERS):
            return yaml.MarkedYAMLError(
                problem=f"the key '{shortened(key)}' has {len(key):,} characters, and YAML allows "
                f"{_MAX_KEY_CHARACTERS:,}",
                problem_mark=mark,
            )
    return None


def _unprintable(error: ReaderError, text: str) -> yaml.YAMLError:
    """The error for a character that YAML does not allow, such as NUL, with its line."""
    line = text.count("\n", 0, error.position)
    column = error.position - (text.rfind("\n", 0, error.position) + 1)
    number = error.character if isinstance(error.character, int) else ord(error.character)
    name = unicodedata.name(chr(number), "NUL" if number == 0 else "a control character")
    return yaml.MarkedYAMLError(
        problem=f"the character U+{number:04X} ({name}) in column {column + 1} is not allowed",
        problem_mark=yaml.Mark("", error.position, line, column, None, 0),
    )


def _refuse_cycles(value: Any, above: tuple[int, ...]) -> None:
    """Refuse `a: &x {b: *x}`, which YAML allows: nothing could be written or compared by its values."""
    if not isinstance(value, dict | list):
        return
    if id(value) in above:
        raise yaml.YAMLError("an anchor stands for a value that contains itself")
    for item in value.values() if isinstance(value, dict) else value:
        _refuse_cycles(item, (*above, id(value)))


class _CoreDumper(yaml.SafeDumper):
    """Writes every text in quotes, and every number as it was written, so that `read_yaml` gives the same."""

    def ignore_aliases(self, data: Any) -> bool:
        """No aliases: a list that stands twice is written twice."""
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def _as_written(dumper: yaml.SafeDumper, number: _Written) -> yaml.ScalarNode:
    kind = "int" if isinstance(number, int) else "float"
    return dumper.represent_scalar(f"tag:yaml.org,2002:{kind}", number.written)


_CoreDumper.add_representer(str, _quoted)
_CoreDumper.add_representer(WrittenInt, _as_written)
_CoreDumper.add_representer(WrittenFloat, _as_written)


def write_yaml(value: Any) -> str:
    """The text of values that `read_yaml` gave, in one line; numbers keep their text."""
    return yaml.dump(value, Dumper=_CoreDumper, default_flow_style=True, width=float("inf"), sort_keys=False)


T = TypeVar("T")


def plain(value: T) -> T:
    """The same values without the texts of numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, WrittenInt):
        return int(value)  # type: ignore[return-value]
    if isinstance(value, WrittenFloat):
        return float(value)  # type: ignore[return-value]
    return value
