"""Numbers of images: of prepared sets, else counted in the user's folder, else from the catalogue."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.contracts.artifact import CARD
from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import DataManifest, DenseManifest, SetManifest, read_manifest
from vitpipe.datasets.catalogue import DatasetFacts, facts

# Measured on a busy core: a listing takes 11 s for a million files of a local disk, annotations 70 s per GB.
_MAX_LISTED, _MAX_ANNOTATION_BYTES = 2_000_000, 50_000_000


def sized_facts(dataset: str, data: DataConfig) -> DatasetFacts:
    """Facts with numbers of images, which are 0 where neither the catalogue nor a folder has them.

    Raises:
        DatasetError: for an unknown name, or a folder that is not a set of this kind.
    """
    known = facts(dataset, data)
    if data.source != "folders" or data.root is None or not (data.root / dataset).is_dir():
        return known
    if not known.num_train_images:
        return _counted(known, data.root)
    # What is wrong with a set is said by `doctor` and `prepare`; a plan then shows the release's numbers.
    try:
        if not _is_quickly_counted(known, data.root / dataset):
            return known
        counted = _counted(known, data.root)
    except (DatasetError, OSError):
        return known
    return counted if counted.num_images else known


def prepared_train_sizes(folder: Path) -> dict[str, int]:
    """Training images of every set of a finished prepare stage; none if there is none."""
    if not (folder / CARD).is_file():
        return {}
    try:
        names = read_manifest(folder, DataManifest).sets
        manifests = {name: read_manifest(folder / name, SetManifest).root for name in names}
    except DatasetError:
        return {}
    return {
        name: found.counts["train_images"]
        if isinstance(found, DenseManifest)
        else found.splits["train"].num_images
        for name, found in manifests.items()
    }


def _is_quickly_counted(known: DatasetFacts, folder: Path) -> bool:
    """Whether a set of the catalogue is counted within seconds: not from archives, not COCO's large files."""
    if known.has_classes:
        return (folder / "train").is_dir() and not _has_more_files(folder / "train", _MAX_LISTED)
    size_bytes = sum(path.stat().st_size for path in folder.glob("annotations/*.json"))
    return size_bytes <= _MAX_ANNOTATION_BYTES and any(path.is_dir() for path in folder.iterdir())


def train_sizes(data: DataConfig, names: Iterable[str]) -> dict[str, int]:
    """Number of training images by dataset name, without those of which it is unknown.

    Raises:
        DatasetError: as `sized_facts`.
    """
    sizes = {name: sized_facts(name, data).num_train_images for name in names}
    return {name: number for name, number in sizes.items() if number}


def _has_more_files(folder: Path, number: int) -> bool:
    """Whether the folders in it hold more entries than this; ends with the first one too much."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                with os.scandir(entry.path) as files:
                    number -= sum(1 for _ in files)
            if number < 0:
                return True
    return False


def _size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    # os.walk, not Path.rglob, which takes 2.5 times as long (50,000 files).
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a link to nowhere
                total += os.stat(f"{where}/{name}").st_size  # noqa: PTH116
    return total


# Once per process: `plan` asks for steps, and again for the cost of packing.
@functools.cache
def _counted(known: DatasetFacts, root: Path) -> DatasetFacts:
    if not known.has_classes:
        from vitpipe.datasets.layouts import verified

        layout = verified(known.kind, root / known.name, known.name)
        size_bytes = sum(layout.tree.size_bytes(name) for name in layout.files)
        counts, num_classes = layout.counts, len(layout.classes)
    else:
        # Listed, not opened: some seconds for a million images.
        from vitpipe.datasets.sources.class_listing import is_no_picture
        from vitpipe.datasets.sources.detect_format import find_source

        source = find_source(root, known.name, known)
        num_classes = len(source.classes)
        counts = {
            f"{split}_images": sum(not is_no_picture(entry.name) for entry in source.entries(split))
            for split in source.splits
        }
        size_bytes = _size_bytes(root / known.name)
    return replace(
        known,
        num_train_images=counts["train_images"],
        num_val_images=counts["val_images"],
        num_classes=num_classes,
        size_bytes=size_bytes,
    )
