"""CIFAR-10 and CIFAR-100, python version (Krizhevsky, 2009): pickles with rows of 3 x 32 x 32 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.archives import safe_tar_stream
from vitpipe.datasets.sources.byte_ranges import Pixels
from vitpipe.datasets.sources.class_listing import shown_below
from vitpipe.datasets.sources.pickles import ByteArray, load_pickle
from vitpipe.datasets.sources.source import Form, ImageEntry, Source

_SIDE = 32


@dataclass(frozen=True)
class _Layout:
    """File names and keys of one of the two sets."""

    archive: str
    folder: str
    batches: dict[str, tuple[str, ...]]
    labels: bytes
    meta: str
    class_names: bytes

    @property
    def line(self) -> str:
        """The layout as one line of text."""
        return f"{self.archive}, or unpacked {self.folder}/{self.batches['train'][0]}, {self.meta}, ..."


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)},
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": _Layout(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        {"train": ("train",), "val": ("test",)},
        b"fine_labels",  # the 100 classes; `coarse_labels` are 20 superclasses
        "meta",
        b"fine_label_names",
    ),
}
LAYOUT = {dataset: layout.line for dataset, layout in _LAYOUTS.items()}


@dataclass(eq=False)
class CifarSource(Source):
    """CIFAR-10 or CIFAR-100; one batch of rows is in memory at a time.

    Attributes:
        path: the folder with the batches, or the archive.
    """

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    path: Path = field(repr=False)
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = ("images keep the order of the batches, which is not by class",)

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Yield the images in the order of batches and rows; labels are the fine ones."""
        layout = _LAYOUTS[self.dataset]
        prefix = shown_below(self.path, self.root)
        for batch in layout.batches[split]:
            content = load_pickle(_read_member(self.path, batch), self.path / batch)
            rows, labels, names = _checked(content, layout.labels, len(self.classes), self.path / batch)
            for row, label, name in zip(rows, labels, names, strict=True):
                # A row is the red plane, then green, then blue, each row-major
                # (cs.toronto.edu/~kriz/cifar.html).
                pixels = row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0).tobytes()
                yield ImageEntry(name, label, Pixels(pixels, _SIDE, _SIDE), f"{prefix}{batch}/{name}")


def has_cifar(root: Path, dataset: str) -> bool:
    """Whether the archive or its unpacked batches exist."""
    return _find(root, _LAYOUTS[dataset]) is not None


def read_cifar(root: Path, dataset: str) -> CifarSource:
    """Read CIFAR-10 or CIFAR-100; unpacked batches take precedence over the archive.

    Raises:
        DatasetError: when a batch is missing, damaged or unsafe.
    """
    layout = _LAYOUTS[dataset]
    path = _find(root, layout)
    if path is None:
        raise DatasetError(f"There is no {layout.archive}", where=root, fix=f"put it there: {layout.line}")
    # Of the archive, a missing batch shows only on reading: a compressed tar has no directory.
    if path.is_dir():
        for name in (layout.meta, *layout.batches["train"], *layout.batches["val"]):
            if not (path / name).is_file():
                raise _missing(path, name)
    meta = load_pickle(_read_member(path, layout.meta), path / layout.meta)
    names = meta.get(layout.class_names) if isinstance(meta, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes) for name in names):
        raise DatasetError(
            f"The file has no class names under '{layout.class_names.decode()}'",
            where=path / layout.meta,
            fix=f"download {layout.archive} again",
        )
    classes = tuple(name.decode("ascii", errors="replace") for name in names)
    form = "unpacked batches" if path.is_dir() else path.name
    return CifarSource(dataset, root, form, classes, path, classes)


def _find(root: Path, layout: _Layout) -> Path | None:
    if (root / layout.folder).is_dir():
        return root / layout.folder
    # The batches directly in the set's folder, without the top folder of the archive.
    if (root / layout.batches["train"][0]).is_file():
        return root
    return root / layout.archive if (root / layout.archive).is_file() else None


def _read_member(path: Path, name: str) -> bytes:
    """Read a file of the folder or of the archive."""
    if path.is_dir():
        return (path / name).read_bytes()
    # The archive is decompressed from its beginning for every batch: seconds, and one batch in memory.
    for member, content in safe_tar_stream(path):
        if PurePosixPath(member).name == name:
            return content
    raise _missing(path, name)


def _missing(path: Path, name: str) -> DatasetError:
    return DatasetError(f"'{name}' is missing", where=path, fix="unpack or download the archive again")


def _checked(
    content: Any, labels_key: bytes, num_classes: int, where: Path
) -> tuple[NDArray[np.uint8], list[int], list[str]]:
    """Rows (N, 3072) uint8, N labels and N file names of a batch.

    Raises:
        DatasetError: when they do not match.
    """
    again = "download the archive again"
    content = content if isinstance(content, dict) else {}
    rows, labels, names = (content.get(key) for key in (b"data", labels_key, b"filenames"))
    if not (isinstance(rows, ByteArray) and isinstance(labels, list) and isinstance(names, list)):
        raise DatasetError(
            f"The batch has no data, {labels_key.decode()} and filenames", where=where, fix=again
        )
    pixels = rows.numbers
    if pixels.shape != (len(labels), 3 * _SIDE**2) or len(names) != len(labels):
        raise DatasetError(
            f"Data {pixels.shape}, {len(labels)} labels and {len(names)} names do not match",
            where=where,
            fix=again,
        )
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise DatasetError(
                f"Row {row} has the label {label}; classes: {num_classes}",
                where=where,
                fix=again,
            )
    return pixels, labels, [_text(name) for name in names]


def _text(name: object) -> str:
    return name.decode("ascii", errors="replace") if isinstance(name, bytes) else str(name)


FORMAT = Form(lambda dataset: (LAYOUT[dataset],), has_cifar, read_cifar)
