"""SVHN, cropped digits (Netzer et al., 2011): train_32x32.mat and test_32x32.mat.

X is (32, 32, 3, N) uint8, y is (N, 1). The 531,131 extra images are not used, as in the published protocols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.sources.byte_ranges import Pixels
from vitpipe.datasets.sources.matlab import read_mat
from vitpipe.datasets.sources.source import Form, ImageEntry, Source

LAYOUT = "train_32x32.mat and test_32x32.mat"
_FILES = {"train": "train_32x32.mat", "val": "test_32x32.mat"}
_NUM_CLASSES = 10
# MATLAB counts from 1, so the release has label 10 for the digit 0; torchvision maps it to 0 as well.
_LABEL_OF_ZERO = 10


@dataclass(eq=False)
class SvhnSource(Source):
    """The cropped digits; the arrays of one split (at most 225 MB) are in memory while it is read."""

    dataset: str
    root: Path
    form: str = "MATLAB files"
    classes: tuple[str, ...] = field(default=tuple(str(digit) for digit in range(_NUM_CLASSES)))
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = (
        "images keep the order of the MATLAB files, which is not by class",
        "digit 0, label 10 in the files, is class 0",
    )

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Yield the images in the order of the file."""
        path = self.root / _FILES[split]
        content = read_mat(path, ("X", "y"), path)
        # MATLAB is column-major: the index of the image is the last axis.
        images, labels = content["X"], np.ravel(content["y"])
        if (
            images.ndim != 4
            or images.shape[2] != 3
            or images.dtype != np.uint8
            or images.shape[3] != len(labels)
        ):
            raise DatasetError(
                f"X is {images.shape} {images.dtype} and y has {len(labels)} labels; "
                "X should be (32, 32, 3, number of labels) uint8",
                where=path,
                fix="download the file again; it must be the one of cropped digits (format 2)",
            )
        height, width = images.shape[:2]
        for position, number in enumerate(labels.tolist()):
            if number not in range(1, _LABEL_OF_ZERO + 1):
                raise DatasetError(
                    f"Image {position + 1} has the label {number}; labels are 1 to 10",
                    where=path,
                    fix="download it again",
                )
            # Images have no names: the file and their number, which counts from 1 as in MATLAB.
            name = f"{path.name.split('_')[0]}_{position + 1:06d}.png"
            pixels = Pixels(images[..., position].tobytes(), height, width)
            yield ImageEntry(name, int(number) % _LABEL_OF_ZERO, pixels, f"{path.name}/{name}")


def has_svhn(root: Path) -> bool:
    """Whether one of the two files exists."""
    return any((root / name).is_file() for name in _FILES.values())


def read_svhn(root: Path, dataset: str) -> SvhnSource:
    """Read SVHN from its MATLAB files.

    Raises:
        DatasetError: when one of them is missing.
    """
    for name in _FILES.values():
        if not (root / name).is_file():
            raise DatasetError(
                f"'{name}' is missing", where=root, fix=f"put it into the folder; SVHN is {LAYOUT}"
            )
    return SvhnSource(dataset, root)


FORMAT = Form(lambda _: (LAYOUT,), lambda root, _: has_svhn(root), read_svhn)
