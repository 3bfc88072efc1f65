"""WordNet ids ("wnids", n01440764) as class keys, and their names for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

SYNSET_NAMES = "LOC_synset_mapping.txt"
WNID = re.compile(r"n\d{8}")


def read_synset_mapping(*folders: Path) -> dict[str, str]:
    """Wnid to name from Kaggle's LOC_synset_mapping.txt in the first folder that has it; else empty.

    Its lines are `n01440764 tench, Tinca tinca`.
    """
    for folder in folders:
        path = folder / SYNSET_NAMES
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            pairs = (line.partition(" ") for line in lines if line.strip())
            return {wnid: name.strip() for wnid, _, name in pairs}
    return {}


def names_of(classes: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes, or none when one of them has no name."""
    return tuple(names[key] for key in classes) if all(key in names for key in classes) else ()
