"""Inspect images and label maps: sizes from headers, labels from pixels."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts.file_tree import FileTree


@dataclass(frozen=True)
class Look:
    """Result of an inspection.

    Attributes:
        num_looked: number of inspected images.
        problems: one error per kind of problem, with examples; not raised.
    """

    num_looked: int
    problems: tuple[DatasetError, ...]


def size_of(tree: FileTree, name: str) -> tuple[int, int] | str:
    """(width, height) of an image from its header, or the reason why it cannot be read."""
    try:
        with tree.open(name) as file, warnings.catch_warnings():
            # Above 89.5 million pixels Pillow only warns; no image of these sets is near that.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                return picture.size
    except Exception as error:  # decoders raise errors of many classes on bad bytes
        return _reason(error)


def labels_of(tree: FileTree, name: str) -> NDArray[np.uint8] | str:
    """The labels of a label map, (H, W) uint8, or the reason why it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(tree.read(name))) as picture:
                # "P" has a palette (DAVIS), "L" has none (ADE20K), "1" is a mask. In RGB the label would
                # be lost.
                if picture.mode not in ("L", "P", "1"):
                    return f"mode {picture.mode} instead of one label per pixel"
                return np.asarray(picture).astype(np.uint8)
    except Exception as error:  # decoders raise errors of many classes on bad bytes
        return _reason(error)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
