"""Report near duplicates between the splits of a packed set: a log line, a table and a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.logger import RunLogger
from vitpipe.data.image_grid import optional_figure
from vitpipe.data.shards import ShardSet, open_shards
from vitpipe.prepare.duplicates import Hashes, duplicate_rows, duplicate_sheet, near_duplicates


def report_duplicates(prepare_folder: Path, dataset: str, logger: RunLogger) -> int:
    """Compare train and val of a packed set by the perceptual hashes that were written while packing.

    Writes the table `near_duplicates_<set>` and, if there are any, `near_duplicates.png` into its folder.

    Returns:
        Number of validation images with a near duplicate in train.

    Raises:
        DatasetError: when the set was packed without hashes.
    """
    splits = {split: open_shards(prepare_folder, dataset, split) for split in ("train", "val")}
    found = near_duplicates(_hashes(splits["train"]), _hashes(splits["val"]))
    logger.say(f"{dataset}: {found.describe()}")

    def name(split: str, position: int) -> str:
        return splits[split].read(position).key

    def read(split: str, position: int) -> Image.Image:
        return splits[split].decode(position)[0]

    rows = duplicate_rows(
        found,
        name,
        train_labels=splits["train"].labels,
        val_labels=splits["val"].labels,
        classes=splits["train"].class_names or splits["train"].classes,
    )
    logger.table(f"near_duplicates_{dataset}", rows)
    path = prepare_folder / dataset / "near_duplicates.png"
    with optional_figure(path.stem, logger.say):
        if duplicate_sheet(found, read, path):
            logger.figure(f"near_duplicates_{dataset}", path)
    return found.num_val_images


def _hashes(shards: ShardSet) -> Hashes:
    path = shards.folder / (shards.manifest.hashes or "")
    # Eight bytes per image. A manifest without hashes gives the folder itself, which is not a file.
    if not path.is_file() or path.stat().st_size != 8 * len(shards):
        raise DatasetError(
            "The set was packed without perceptual hashes",
            where=shards.folder,
            fix="set data.near_duplicates=true and run the prepare stage again",
        )
    # Little-endian on disk, whatever machine packed the set.
    return np.fromfile(path, "<u8").astype(np.uint64)
