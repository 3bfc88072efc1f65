"""Inspect images and label maps: sizes of images that decode, values of label maps."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitpipe.contracts.errors import DatasetError, reason_of
from vitpipe.datasets.layouts.file_tree import FileTree

# "P" has a palette (DAVIS), "L" has none (ADE20K), "1" is a mask; "I" and "I;16" come from 16-bit PNGs. In
# RGB the label would be lost.
_LABEL_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
# Pillow's limit for a warning, of 0.25 GB; no image of these sets is near that.
_MAX_PIXELS = 89_478_485


class Labels(NamedTuple):
    """A label map: (width, height), and the values that occur, in order."""

    size: tuple[int, int]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """Result of an inspection.

    Attributes:
        num_looked: number of inspected images.
        problems: one error per kind of problem, with examples; not raised.
    """

    num_looked: int
    problems: tuple[DatasetError, ...]


def sizes_of(tree: FileTree, names: Sequence[str]) -> Iterator[tuple[int, int] | str]:
    """(width, height) of every image after decoding it, or the reason why it cannot be read."""
    with _pool() as pool:
        yield from pool.map(lambda name: _size_of(tree, name), names)


def label_maps_of(tree: FileTree, names: Sequence[str]) -> Iterator[Labels | str]:
    """Every label map's size and values, or the reason why it cannot be read."""
    with _pool() as pool:
        yield from pool.map(lambda name: _labels_of(tree, name), names)


def _pool() -> ThreadPoolExecutor:
    # Threads, not processes: decoders release Python's lock, and a tree of open archives cannot be sent.
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _size_of(tree: FileTree, name: str) -> tuple[int, int] | str:
    try:
        with tree.open(name) as file, Image.open(file) as picture:
            size = picture.size
            if size[0] * size[1] > _MAX_PIXELS:
                return f"{size[0]}x{size[1]} pixels"
            # All data is read, so that a cut file is found; libjpeg decodes to 1/8 of the size much faster.
            picture.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
            picture.load()
            return size
    except Exception as error:  # decoders raise errors of many classes on bad bytes
        return reason_of(error)


def _labels_of(tree: FileTree, name: str) -> Labels | str:
    try:
        with Image.open(io.BytesIO(tree.read(name))) as picture:
            if picture.mode not in _LABEL_MODES:
                return f"mode {picture.mode} instead of one label per pixel"
            if picture.width * picture.height > _MAX_PIXELS:
                return f"{picture.width}x{picture.height} pixels"
            return Labels(picture.size, tuple(np.unique(np.asarray(picture)).tolist()))
    except Exception as error:  # decoders raise errors of many classes on bad bytes
        return reason_of(error)
