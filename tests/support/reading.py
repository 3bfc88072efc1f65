"""Read sources completely, and require errors with a location and a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.datasets.sources.source import Source


def listed(source: Source, split: str) -> list[tuple[str, int, bytes]]:
    """(name, label, content) of every image of a split."""
    return [(entry.name, entry.label, entry.place.read()) for entry in source.entries(split)]


def read_everything(root: Path, dataset: str) -> None:
    """Detect a set's format and read all its images."""
    source = find_source(root, dataset)
    for split in source.splits:
        listed(source, split)


def refuse(root: Path, dataset: str = "imagenet") -> DatasetError:
    """Require a `DatasetError` with `where` and `fix` between detection and the last image."""
    with pytest.raises(DatasetError) as caught:
        read_everything(root, dataset)
    assert caught.value.where
    assert caught.value.fix
    return caught.value
