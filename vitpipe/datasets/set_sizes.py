"""Numbers of images: from the catalogue, or counted in the folder of a set of which it has none."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.datasets.catalogue import DatasetFacts, facts


def sized_facts(dataset: str, data: DataConfig) -> DatasetFacts:
    """Facts with numbers of images, which are 0 where neither the catalogue nor a folder has them.

    Raises:
        DatasetError: for an unknown name, or a folder that is not a set of this kind.
    """
    known = facts(dataset, data)
    if known.num_train_images or data.source != "folders" or data.root is None:
        return known
    if not (data.root / dataset).is_dir():
        return known
    return _counted(known, data.root)


def train_sizes(data: DataConfig, names: Iterable[str]) -> dict[str, int]:
    """Number of training images by dataset name, without those of which it is unknown.

    Raises:
        DatasetError: as `sized_facts`.
    """
    sizes = {name: sized_facts(name, data).num_train_images for name in names}
    return {name: number for name, number in sizes.items() if number}


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
        from vitpipe.datasets.sources.detect_format import find_source

        source = find_source(root, known.name, known)
        num_classes = len(source.classes)
        counts = {f"{split}_images": sum(1 for _ in source.entries(split)) for split in source.splits}
        size_bytes = sum(path.stat().st_size for path in (root / known.name).rglob("*") if path.is_file())
    return replace(
        known,
        num_train_images=counts["train_images"],
        num_val_images=counts["val_images"],
        num_classes=num_classes,
        size_bytes=size_bytes,
    )
