"""Sets that can be listed class by class: folders, tars with one class each, images named by a list.

A `ClassSource` puts one such listing per split together, whichever form each of them has; so the same set
gives the same images in the same order from every form.
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.sources.byte_ranges import ByteRange, FileSpan
from vitpipe.datasets.sources.source import ImageEntry, Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# ImageNet-22K has no validation set; one image in this many is kept out of training to measure on.
HELD_OUT_ONE_IN = 200
HELD_OUT_NOTE = f"val is one in {HELD_OUT_ONE_IN} images of train, chosen by name and kept out of training"


class FoundImage(NamedTuple):
    """An image whose class is known from where it was found; fields as in `ImageEntry`."""

    name: str
    place: ByteRange
    shown: str


class ImagesByClass(ABC):
    """The images of one split.

    Attributes:
        classes: class keys, sorted.
        where: file or folder, for messages.
    """

    classes: tuple[str, ...]
    where: Path

    @abstractmethod
    def images(self, key: str) -> list[FoundImage]:
        """The images of one class, by file name.

        Raises:
            DatasetError: when what should hold them is damaged or empty.
        """


class FolderClasses(ImagesByClass):
    """<folder>/<class>/<image>; hidden files are passed over.

    Args:
        folder: of the split.
        root: the set's folder.

    Raises:
        DatasetError: when there are no class folders or images lie loose.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.where, self.classes = folder, class_folders_of(folder)
        self._shown = shown_below(folder, root)

    def images(self, key: str) -> list[FoundImage]:
        """The entries of the class's folder; links are followed when they are read."""
        folder, shown = self.where / key, f"{self._shown}{key}"
        try:
            names = visible_names(folder)
        except OSError as error:
            raise DatasetError(
                f"The class folder cannot be read any more ({error.strerror})",
                where=folder,
                fix="check that nothing else changes the set, then run the same command again",
            ) from error
        return [FoundImage(name, FileSpan(f"{folder}/{name}"), f"{shown}/{name}") for name in names]

    def empty(self, keys: Iterable[str]) -> list[str]:
        """Those of the classes whose folders hold nothing."""
        return [key for key in keys if not _holds_something(self.where / key)]


class ListedImages(ImagesByClass):
    """Images whose classes are named elsewhere, held as a list.

    Args:
        images: (class key, image).
        where: the folder or archive that they lie in.
    """

    def __init__(self, images: Iterable[tuple[str, FoundImage]], where: Path) -> None:
        self._images: dict[str, list[FoundImage]] = defaultdict(list)
        for key, image in images:
            self._images[key].append(image)
        self.where, self.classes = where, tuple(sorted(self._images))

    def images(self, key: str) -> list[FoundImage]:
        """The images of one class, maybe none."""
        return sorted(self._images.get(key, ()), key=lambda image: (image.name, image.shown))


@dataclass(eq=False)
class ClassSource(Source):
    """A set whose splits are listed class by class.

    Attributes:
        parts: the images of each split; both splits may name the same ones when val is held out.
        holds_out: val is a fixed share of train, chosen by file name.
    """

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    parts: dict[str, ImagesByClass] = field(repr=False)
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = ()
    holds_out: bool = False

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Class by class in the order of class numbers, within a class by file name."""
        part = self.parts[split]
        for label, key in enumerate(self.classes):
            for name, place, shown in part.images(key):
                if not self.holds_out or is_held_out(name) == (split == "val"):
                    yield ImageEntry(name, label, place, shown)


def is_held_out(name: str) -> bool:
    """Whether an image of a set without val belongs to the share that is measured on; by its name alone."""
    return zlib.crc32(name.encode(errors="surrogateescape")) % HELD_OUT_ONE_IN == 0


def class_folders_of(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted.

    Raises:
        DatasetError: when there are none or images lie loose.
    """
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        classes = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    loose = sorted(entry.name for entry in visible if entry.name.lower().endswith(IMAGE_SUFFIXES))
    if loose:
        raise DatasetError(
            f"{len(loose)} images lie directly in '{folder.name}', not in class folders: {some(loose)}",
            where=folder,
            fix="move each image into the folder of its class; for ImageNet's val the classes are in "
            "ILSVRC2012_validation_ground_truth.txt: with ILSVRC2012_devkit_t12.tar.gz or Kaggle's "
            "LOC_val_solution.csv beside train/ and val/ the images may stay where they are",
        )
    packed = sorted(entry.name for entry in visible if entry.name.endswith(".tar"))
    packed = [name for name in packed if name.removesuffix(".tar") not in classes]
    if classes and packed:
        raise DatasetError(
            f"{len(packed)} classes are not unpacked yet: {some(packed)}",
            where=folder,
            fix="unpack each tar into a folder of its name, or remove the folders: tars are read as well",
        )
    if not classes:
        raise DatasetError(
            "There are no class folders", where=folder, fix="unpack the set as <class>/<image>"
        )
    return classes


def has_subfolders(folder: Path) -> bool:
    """Whether it is a folder with folders in it."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def visible_names(folder: Path) -> list[str]:
    """Names in a folder without hidden ones, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def shown_below(path: Path, root: Path) -> str:
    """The path below the set's folder as a prefix for what is inside: `train/`, or nothing for the root."""
    return "" if path == root else f"{path.relative_to(root).as_posix()}/"


def first_existing(*paths: Path) -> Path | None:
    """The first of the paths that is there."""
    return next((path for path in paths if path.exists()), None)


def _holds_something(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") for entry in entries)
