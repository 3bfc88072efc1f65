"""Sets that can be listed class by class: class folders, one tar per class, images assigned by a list.

A `ClassSource` combines one such listing per split, each in its own format; so the same set gives the
same images in the same order from every format.
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
from vitpipe.contracts.units import counted
from vitpipe.datasets.sources.byte_ranges import ByteRange, FileSpan
from vitpipe.datasets.sources.source import ImageEntry, Source

# Those of torchvision's ImageFolder (IMG_EXTENSIONS), without .pgm.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# Files that lie among images and are none by their kind; what has another name is opened as an image.
_OTHER_SUFFIXES = (
    ".csv", ".db", ".htm", ".html", ".ini", ".json", ".log", ".lnk", ".md", ".md5", ".mat", ".npy", ".npz",
    ".pdf", ".py", ".sha256", ".svg", ".tsv", ".txt", ".url", ".xml", ".yaml", ".yml",
)  # fmt: skip
# ImageNet-22K has no validation set: one image in this many is kept out of training to evaluate on, about
# 71,000 of 14.2 million. Changing it changes what a published number means (tests hold it).
HELD_OUT_ONE_IN = 200
HELD_OUT_NOTE = f"val is one in {HELD_OUT_ONE_IN} images of train, chosen by name and kept out of training"


class FoundImage(NamedTuple):
    """An image whose class is known from its location.

    Attributes:
        name: file name.
        byte_range: reference to its bytes.
        shown: display path, as in `ImageEntry`.
    """

    name: str
    byte_range: ByteRange
    shown: str


class ImagesByClass(ABC):
    """The images of one split.

    Attributes:
        classes: class keys, sorted.
        where: file or folder that contains them, for messages.
    """

    classes: tuple[str, ...]
    where: Path

    @abstractmethod
    def images(self, key: str) -> list[FoundImage]:
        """The images of one class, sorted by file name.

        Raises:
            DatasetError: when their folder or archive is damaged or empty.
        """


class FolderClasses(ImagesByClass):
    """Class folders <folder>/<class>/<image>; hidden files are skipped.

    Args:
        folder: of the split.
        root: the set's folder.

    Raises:
        DatasetError: when there are no class folders, or images outside of them.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.where, self.classes = folder, class_folders_of(folder)
        self._shown = shown_below(folder, root)

    def images(self, key: str) -> list[FoundImage]:
        """The files of the class's folder. Symbolic links are allowed: the folder is the user's own."""
        folder, shown = self.where / key, f"{self._shown}{key}"
        try:
            names = visible_names(folder)
        except OSError as error:
            raise DatasetError(
                f"The class folder can no longer be read ({error.strerror})",
                where=folder,
                fix="stop whatever changes the set, then run the same command again",
            ) from error
        # Text, not `folder / name`: pathlib takes several times as long, for up to 14 million images.
        return [FoundImage(name, FileSpan(f"{folder}/{name}"), f"{shown}/{name}") for name in names]

    def empty(self, keys: Iterable[str]) -> list[str]:
        """Those of the given classes whose folders are empty."""
        return [key for key in keys if not _has_entries(self.where / key)]


class ListedImages(ImagesByClass):
    """Images whose classes are given by a separate list.

    Args:
        images: pairs (class key, image).
        where: the folder or archive that contains them.
    """

    def __init__(self, images: Iterable[tuple[str, FoundImage]], where: Path) -> None:
        self._images: dict[str, list[FoundImage]] = defaultdict(list)
        for key, image in images:
            self._images[key].append(image)
        self.where, self.classes = where, tuple(sorted(self._images))

    def images(self, key: str) -> list[FoundImage]:
        """The images of one class, sorted by file name; possibly none."""
        # Archives are in no order; the display path decides between equal names in different folders.
        return sorted(self._images.get(key, ()), key=lambda image: (image.name, image.shown))


@dataclass(eq=False)
class ClassSource(Source):
    """A set whose splits are listed class by class.

    Attributes:
        parts: the images of each split; the same ones for both when val is held out.
        holds_out: val is a fixed share of train, selected by file name.
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
            for name, byte_range, shown in part.images(key):
                if not self.holds_out or is_held_out(name) == (split == "val"):
                    yield ImageEntry(name, label, byte_range, shown)


def is_no_picture(name: str) -> bool:
    """Whether a file is no image by its kind: text, drawings (SVG), databases of thumbnails."""
    return name.lower().endswith(_OTHER_SUFFIXES)


def is_held_out(name: str) -> bool:
    """Whether an image of a set without val belongs to the held-out share, by its file name alone."""
    # CRC-32 and not `hash`, which is seeded per process. By name, so that the share is the same in every
    # format and does not change when other images are missing.
    return zlib.crc32(name.encode(errors="surrogateescape")) % HELD_OUT_ONE_IN == 0


def class_folders_of(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted.

    Raises:
        DatasetError: when there are none, or images or packed classes beside them.
    """
    # `scandir` knows the type of an entry without a `stat` per entry, which matters on network file systems.
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        classes = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    # Usually the validation images of ImageNet as released, which are not in class folders.
    flat = sorted(entry.name for entry in visible if entry.name.lower().endswith(IMAGE_SUFFIXES))
    if flat:
        raise DatasetError(
            f"{counted(len(flat), 'image is', 'images are')} directly in '{folder.name}', not in "
            f"class folders: {some(flat)}",
            where=folder,
            fix="move each image into the folder of its class; or, for ImageNet's val, put "
            "ILSVRC2012_devkit_t12.tar.gz (it has ILSVRC2012_validation_ground_truth.txt) or Kaggle's "
            "LOC_val_solution.csv beside train/ and val/",
        )
    # A killed unpacking loop leaves both: the classes that are still tars would be missing without any error.
    packed = sorted(entry.name for entry in visible if entry.name.endswith(".tar"))
    packed = [name for name in packed if name.removesuffix(".tar") not in classes]
    if classes and packed:
        raise DatasetError(
            f"{counted(len(packed), 'class is', 'classes are')} still packed: {some(packed)}",
            where=folder,
            fix="unpack each tar into a folder of its name, or remove the folders: tars are read directly",
        )
    # The names go into manifests, tables and reports, which are UTF-8. Names of files may be any bytes.
    if odd := [name for name in classes if name != name.encode(errors="replace").decode()]:
        shown = some([ascii(name)[1:-1] for name in odd])
        raise DatasetError(
            f"{counted(len(odd), 'class folder has a name', 'class folders have names')} not in "
            f"UTF-8: {shown}",
            where=ascii(str(folder))[1:-1],
            fix="rename them, for example by `convmv -f latin1 -t utf8`",
        )
    if not classes:
        raise DatasetError(
            "There are no class folders", where=folder, fix="unpack the set as <class>/<image>"
        )
    return classes


def has_subfolders(folder: Path) -> bool:
    """Whether it is a folder that contains folders."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def visible_names(folder: Path) -> list[str]:
    """Names in a folder without hidden ones, sorted."""
    # Hidden: .DS_Store, macOS's ._name, temporary files of rsync.
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def shown_below(path: Path, root: Path) -> str:
    """Display path below the set's folder as a prefix: `train/`, or empty for the folder itself."""
    return "" if path == root else f"{path.relative_to(root).as_posix()}/"


def first_existing(*paths: Path) -> Path | None:
    """The first of the paths that exists."""
    return next((path for path in paths if path.exists()), None)


def _has_entries(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") and not is_no_picture(entry.name) for entry in entries)
