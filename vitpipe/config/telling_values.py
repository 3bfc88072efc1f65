"""Which values of a recipe tell runs apart first, and how keys and values are written in few characters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vitpipe.config.digest import digest_of

# By the last parts of a key, the most telling first. What decides weights follows, then all others.
_ORDER = (
    re.compile(r"\w+\.(epochs|steps)"),
    re.compile(r"(\w+\.)+base_lr"),
    re.compile(r"seed"),
    re.compile(r"model\..+"),
    re.compile(r"data\.(?!root$|store$|workers$).+|\w+\.dataset"),
)
_WORDS = {"base_lr": "learning rate", "min_lr": "minimal learning rate", "warmup_lr": "warm-up learning rate"}
# A part of a key that says nothing without the one before it: `model.name`, `method.name`.
_BARE = "name"
_PLAIN = re.compile(r"[\w./@+-]*")
_MAX_LENGTH, _SHOWN_LENGTH, _DIGEST_DIGITS = 28, 18, 8


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested values; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat_values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def telling_order(keys: Iterable[str], deciding: Collection[str]) -> list[str]:
    """Dotted keys of a recipe, those first by which people tell runs apart.

    That is epochs and steps of stages, learning rates, the seed, the network, the data, then what else
    decides weights, then all others.

    Args:
        deciding: keys that decide weights.
    """

    def rank(key: str) -> int:
        found = next((i for i, pattern in enumerate(_ORDER) if pattern.fullmatch(key)), len(_ORDER))
        return found if found < len(_ORDER) or key in deciding else len(_ORDER) + 1

    return sorted(keys, key=rank)


def value_text(value: Any) -> str:
    """A value as people write it; two values of a key never give the same text.

    Whole numbers have no point; a text that could be taken for more than one value stands in quotes.
    """
    if (
        isinstance(value, str)
        and value
        and _PLAIN.fullmatch(value)
        and value not in ("null", "true", "false")
    ):
        return value
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_whole else value, ensure_ascii=False)


def short_text(value: Any) -> str:
    """`value_text`; the beginning and a digest of what is longer than a few words."""
    text = value_text(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_SHOWN_LENGTH]}…#{short_digest(text)}"


def short_digest(value: Any) -> str:
    """The first digits of the SHA-256 of a JSON-able value."""
    return digest_of(value)[:_DIGEST_DIGITS]


def short_keys(keys: Collection[str]) -> dict[str, str]:
    """Key -> the last words of it that no other of the keys ends in: `epochs`, `pretrain learning rate`."""
    return {key: next(words for words in _endings(key) if _is_only(words, key, keys)) for key in keys}


def _is_only(words: str, key: str, keys: Collection[str]) -> bool:
    return not any(words in _endings(other) for other in keys if other != key)


def _endings(key: str) -> list[str]:
    """Ways to write a key, the shortest first; the last one is the key itself."""
    parts = key.split(".")
    # The name of a network stands for the network: `model`, not `name`.
    shown = parts[:-1] if len(parts) > 1 and parts[-1] == _BARE else parts
    texts = [_WORDS.get(part, part.replace("_", " ")) for part in shown]
    # `optim` only groups keys; it is named where the key is spelt out.
    texts = [text for text in texts if text != "optim"] or texts
    return [" ".join(texts[start:]) for start in reversed(range(len(texts)))] + [key]
