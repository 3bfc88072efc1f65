"""The tables of `prepare` for sets of any size, without any image: what verdicts look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitpipe.contracts.artifact import write_table
from vitpipe.datasets.catalogue import FACTS, class_order


def catalogue_rows(name: str) -> list[dict[str, Any]]:
    """The rows of `splits` of a catalogue set that is whole."""
    known = FACTS[name]
    return [
        {
            "dataset": name,
            "split": split,
            "num_images": number,
            "num_annotations": number,
            "num_classes": known.num_classes,
            "num_bytes": 9_000_000,
        }
        for split, number in (("train", known.num_train_images), ("val", known.num_val_images))
    ]


def write_catalogue_tables(folder: Path, names: Iterable[str]) -> None:
    """Write `splits` and `classes` as `prepare` does for whole sets of the catalogue."""
    names = list(names)
    write_table(folder, "splits", [row for name in names for row in catalogue_rows(name)])
    keys = [(name, key) for name in names for key in class_order(name)]
    write_table(folder, "classes", [{"dataset": name, "class": key, "name": key} for name, key in keys])
