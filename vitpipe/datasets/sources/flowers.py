"""Oxford Flowers-102 (Nilsback and Zisserman, 2008): an archive or a folder, and lists in MATLAB files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import safe_tar_stream
from vitpipe.datasets.catalogue import class_names
from vitpipe.datasets.sources.byte_ranges import FileSpan, Inline
from vitpipe.datasets.sources.class_listing import (
    ClassSource,
    FoundImage,
    ImagesByClass,
    ListedImages,
    visible_names,
)
from vitpipe.datasets.sources.matlab import read_mat
from vitpipe.datasets.sources.source import Form, ImageEntry, Source

LAYOUT = "102flowers.tgz (or its folder jpg/) with imagelabels.mat and setid.mat"
ARCHIVE = "102flowers.tgz"
# Train is the authors' train and validation sets together (1,020 images each), val is their test set
# (6,149), as in the transfer experiments of the papers.
_SETS = {"train": ("trnid", "valid"), "val": ("tstid",)}
_IMAGE = re.compile(r"image_(\d{5})\.jpg")
_NOTES = (
    "train is the authors' train and validation sets, val is their test set",
    "class numbers are the authors' labels 1 to 102 minus 1; released checkpoints trained on class folders "
    "named 1 to 102 number them as sorted text (1, 10, 100, 101, 102, 11, ...)",
)


@dataclass(frozen=True)
class _Lists:
    """Label (from 0) by image number (from 1), and the image numbers of each split."""

    labels: dict[int, int]
    numbers: dict[str, list[int]]
    classes: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the flowers; empty if this is not the whole set."""
        names = class_names("flowers102")
        return names if len(names) == len(self.classes) else ()


@dataclass(eq=False)
class FlowersArchive(Source):
    """The set with its images in the compressed archive, which can only be read sequentially."""

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    lists: _Lists = field(repr=False)
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = (*_NOTES, "images keep the order of the archive, which is not by class")

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Yield the images in the order of the archive."""
        # One pass per split: 345 MB, decompressed in seconds. Sorting by class would need all images in
        # memory.
        left = set(self.lists.numbers[split])
        archive = self.root / ARCHIVE
        for member, content in safe_tar_stream(archive):
            name = PurePosixPath(member).name
            match = _IMAGE.fullmatch(name)
            if match and int(match[1]) in left:
                left.remove(int(match[1]))
                label = self.lists.labels[int(match[1])]
                yield ImageEntry(name, label, Inline(content), f"{ARCHIVE}/{member}")
        if left:
            raise _missing(left, archive)


def has_flowers(root: Path) -> bool:
    """Whether any part of the set exists."""
    return any((root / name).exists() for name in (ARCHIVE, "jpg", "imagelabels.mat", "setid.mat"))


def read_flowers(root: Path, dataset: str) -> Source:
    """Read Flowers-102; the folder takes precedence over the archive.

    Raises:
        DatasetError: when a file is missing or damaged, or the lists do not match the images.
    """
    for name in ("imagelabels.mat", "setid.mat"):
        if not (root / name).is_file():
            raise DatasetError(
                f"'{name}', which has the labels or splits, is missing",
                where=root,
                fix=f"put it into the folder: {LAYOUT}",
            )
    lists = _read_lists(root)
    if (root / "jpg").is_dir():
        return _from_folder(root, dataset, lists)
    if (root / ARCHIVE).is_file():
        return FlowersArchive(
            dataset, root, f"{ARCHIVE} with its lists", lists.classes, lists, lists.class_names
        )
    raise DatasetError("The images are missing", where=root / ARCHIVE, fix=f"put {LAYOUT} there")


def _from_folder(root: Path, dataset: str, lists: _Lists) -> ClassSource:
    folder = root / "jpg"
    # One listing instead of 8,189 calls of `exists`.
    present = set(visible_names(folder))
    parts: dict[str, ImagesByClass] = {}
    for split, numbers in lists.numbers.items():
        absent = {number for number in numbers if _name(number) not in present}
        if absent:
            raise _missing(absent, folder)
        parts[split] = ListedImages(
            ((lists.classes[lists.labels[n]], _found(folder, n)) for n in numbers), folder
        )
    return ClassSource(
        dataset, root, "folder jpg/ with its lists", lists.classes, parts, lists.class_names, notes=_NOTES
    )


def _read_lists(root: Path) -> _Lists:
    labels_path, sets_path = root / "imagelabels.mat", root / "setid.mat"
    # (1, N) arrays of doubles or uint16; counted from 1.
    labels = np.ravel(read_mat(labels_path, ("labels",), labels_path)["labels"]).astype(int).tolist()
    sets = read_mat(sets_path, [name for names in _SETS.values() for name in names], sets_path)
    numbers = {
        split: [number for name in names for number in np.ravel(sets[name]).astype(int).tolist()]
        for split, names in _SETS.items()
    }
    listed = numbers["train"] + numbers["val"]
    outside = sorted(number for number in set(listed) if not 1 <= number <= len(labels))
    if outside or len(set(listed)) != len(listed):
        raise DatasetError(
            f"The lists name images twice or beyond the {counted(len(labels), 'label')}: "
            f"{some(outside) or 'twice'}",
            where=sets_path,
            fix="download setid.mat and imagelabels.mat again, of the same release",
        )
    # From the labels, not 102: miniatures of the set have fewer. Text keys, as names of class folders
    # would be.
    num_classes = max(labels, default=0)
    if set(labels) != set(range(1, num_classes + 1)) or not labels:
        raise DatasetError(
            f"Labels are not 1 to {num_classes} without gaps",
            where=labels_path,
            fix="download imagelabels.mat again",
        )
    classes = tuple(str(label) for label in range(1, num_classes + 1))
    return _Lists({number: label - 1 for number, label in enumerate(labels, start=1)}, numbers, classes)


def _name(number: int) -> str:
    return f"image_{number:05d}.jpg"


def _found(folder: Path, number: int) -> FoundImage:
    name = _name(number)
    return FoundImage(name, FileSpan(f"{folder}/{name}"), f"jpg/{name}")


def _missing(numbers: set[int], where: Path) -> DatasetError:
    names = [_name(number) for number in sorted(numbers)]
    return DatasetError(
        f"{counted(len(names), 'image is', 'images are')} missing: {some(names)}",
        where=where,
        fix=f"download {ARCHIVE} again",
    )


FORMAT = Form(lambda _: (LAYOUT,), lambda root, _: has_flowers(root), read_flowers)
