"""What a classification set looks like to the packer, in whatever form it lies on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpipe.datasets.sources.byte_ranges import ByteRange


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image of a source, not yet read.

    Attributes:
        name: its file name with extension, without folders; part of the packed bytes.
        label: class number.
        place: where its bytes are.
        shown: what a person would call it: the path below the set's folder, archives as if they were folders.
    """

    name: str
    label: int
    place: ByteRange
    shown: str


class Source(ABC):
    """A classification set in one form.

    The same set packs to the same bytes from folders and from archives: images come class by class in
    the order of class numbers, within a class by file name. A form that cannot be read in that order
    without holding everything in memory (parquet, pickles) keeps its own and says so in `notes`.

    Attributes:
        dataset: name in the catalogue.
        root: the set's folder, for messages.
        form: what was found there, for people: "class folders", "the original tars and devkit", ...
        classes: class keys in the order of class numbers (wnids, folder names, or names).
        class_names: names for people, one per class; empty when unknown.
        splits: `train`, `val`.
        notes: what a reader of results should know: held-out images, class order, own order of images.
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
        """All images of a split in the canonical order, listed while it goes: memory is one class at most.

        Raises:
            DatasetError: when the source turns out not to be what it looked like.
        """
