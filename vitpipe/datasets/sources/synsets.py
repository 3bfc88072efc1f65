"""WordNet ids ("wnids", such as n01440764) as class keys, and their readable names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

SYNSET_NAMES = "LOC_synset_mapping.txt"
# "n" for noun and the offset of the synset in WordNet 3.0's data file, eight digits.
WNID = re.compile(r"n\d{8}")


def read_synset_mapping(*folders: Path) -> dict[str, str]:
    """Name by wnid from Kaggle's LOC_synset_mapping.txt in the first folder that has it, or empty."""
    for folder in folders:
        path = folder / SYNSET_NAMES
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            # Lines are `n01440764 tench, Tinca tinca`.
            pairs = (line.partition(" ") for line in lines if line.strip())
            return {wnid: name.strip() for wnid, _, name in pairs}
    return {}


def names_of(classes: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes; empty when any class has no name."""
    # All or none: readers of `class_names` index it by class number.
    return tuple(names[key] for key in classes) if all(key in names for key in classes) else ()
