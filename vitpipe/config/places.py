"""Where a changed value of a recipe was written: in params.yaml or by --set. Messages name the place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self


class PlacedText(str):
    """An override (`a.b=c`) that remembers the file it stands in; any other text comes from --set."""

    place: str

    @classmethod
    def at(cls, file: Path, text: str) -> Self:
        """The text with the file that holds it."""
        made = cls(text)
        made.place = str(file)
        return made


def place_of(override: str) -> str:
    """The file that an override stands in, or `--set`."""
    return override.place if isinstance(override, PlacedText) else "--set"


class Places:
    """Which place has set which key of a recipe; later ones win.

    Args:
        recipe: what messages call the recipe itself, for keys that nobody has changed.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._set: list[tuple[list[str], str]] = []

    def add(self, override: str, place: str) -> None:
        """Remember an override `a.b=c`."""
        self._set.append((override.partition("=")[0].strip().split("."), place))

    def of(self, keys: Sequence[str]) -> str:
        """The place of a value, by the keys that lead to it."""
        for set_keys, place in reversed(self._set):
            # A section that was set as a whole holds the key; a key that was set lies in the wrong section.
            shared = min(len(set_keys), len(keys))
            if shared and set_keys[:shared] == list(keys[:shared]):
                return place
        return self.recipe

    def named_in(self, message: str) -> str:
        """The place of a mistake that has no key of its own: of the changed key that the message names."""
        words = set(re.findall(r"[\w.]+", message))
        for set_keys, place in reversed(self._set):
            if {".".join(set_keys), set_keys[-1]} & words:
                return place
        return self.recipe
