"""The interface between a classification set in any format and the packer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpipe.datasets.sources.byte_ranges import ByteRange


# Slots: entries are made by the million, and a dictionary each would multiply their size.
@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image of a source, not yet read.

    Attributes:
        name: file name with extension, without folders; written into the shard.
        label: class number.
        place: reference to its bytes.
        shown: display path below the set's folder, with archives written as folders.
    """

    name: str
    label: int
    place: ByteRange
    shown: str


class Source(ABC):
    """A classification set in one format.

    The canonical order is by class number, within a class by file name; so the same set packs to the same
    bytes from folders and from archives. A format that cannot be read in this order without holding
    everything in memory (parquet, pickles, compressed tars) keeps its own order and states so in `notes`.

    Attributes:
        dataset: name in the catalogue.
        root: the set's folder, for messages.
        form: description of the format that was found: "class folders", "the original tars and devkit", ...
        classes: class keys in the order of class numbers (wnids, folder names, or names).
        class_names: readable names, one per class; empty when unknown.
        splits: `train`, `val`.
        notes: what a reader of results must know: held-out images, class order, order of images.
    """

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = ()

    @abstractmethod
    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Yield all images of a split in the canonical order; at most one class is in memory at a time.

        Raises:
            DatasetError: when a part of the source is damaged, missing or inconsistent.
        """


@dataclass(frozen=True)
class Form:
    """One format in which sets are accepted: `FORMAT` of a module of this package.

    Attributes:
        layouts: the required files of a set of this name, as text.
        is_present: whether a folder contains any of them, of a set of this name; fast.
        read: makes the source of a folder and a name; raises a `DatasetError` that says what is wrong.
    """

    layouts: Callable[[str], tuple[str, ...]]
    is_present: Callable[[Path, str], bool]
    read: Callable[[Path, str], Source]
