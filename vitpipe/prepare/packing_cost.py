"""Estimate the cost of packing before any file is read: bytes, shards, hours. Shown by `vitpipe plan`.

Image counts and source sizes are the published ones (`catalogue.py`). Packed sizes follow from the format of
a shard, hours from the speed that `vitpipe benchmark pack` measured on this machine.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from vitpipe.config.cache_folder import cache_folder
from vitpipe.config.data import DataConfig
from vitpipe.config.resolve import UNKNOWN, num_packers
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.units import format_bytes, format_duration
from vitpipe.datasets.catalogue import DatasetFacts
from vitpipe.datasets.set_sizes import sized_facts
from vitpipe.datasets.subsets import views_among

SPEED_FILE = "pack-speed.json"
# For machines without a measurement: `vitpipe benchmark pack` on two cores of a shared EPYC server, 2026.
DEFAULT_IMAGES_PER_SECOND = 3800.0
DEFAULT_MEGABYTES_PER_SECOND = 50.0
_BLOCK = 512  # a tar archive consists of blocks of 512 bytes
# The image's header and its padding (half a block on average), the header and the one block of its label.
_SHARD_BYTES_PER_IMAGE = _BLOCK + _BLOCK // 2 + 2 * _BLOCK
_END_BYTES = 2 * _BLOCK  # two zero blocks end a tar archive
_INDEX_BYTES = 24  # shard_writer.INDEX_RECORD
# Small photographs (CIFAR, SVHN) as PNG, in bytes per byte of pixels; an estimate.
_PNG_RATIO = 0.75


class PackSpeed(BaseModel):
    """Packing speed of one core; 1 MB is 10^6 bytes.

    Attributes:
        measured_at: ISO 8601 time; empty for the built-in default.
        cores: number of cores measured together; None for the default.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    images_per_second_per_core: PositiveFloat
    megabytes_per_second_per_core: PositiveFloat
    measured_at: str = ""
    cores: PositiveInt | None = None

    def __str__(self) -> str:
        """One line of text with the source of the numbers."""
        where = (
            f"measured {self.measured_at}" if self.measured_at else "default, not measured on this machine"
        )
        return (
            f"{self.images_per_second_per_core:,.0f} images/s and "
            f"{self.megabytes_per_second_per_core:,.0f} MB/s per core ({where})"
        )

    def hours(self, num_images: int, num_bytes: int, num_cores: int) -> float:
        """Hours to pack `num_images` images of `num_bytes` bytes in total."""
        # The overhead per file limits small images, decoding limits large ones: the slower one counts.
        seconds = max(
            num_images / self.images_per_second_per_core,
            num_bytes / 1e6 / self.megabytes_per_second_per_core,
        )
        return seconds / num_cores / 3600


@dataclass(frozen=True)
class SetCost:
    """Estimated cost of one dataset.

    Attributes:
        source_bytes: size of the released images.
        packed_bytes: size of shards and index, or of the archive of a dense set; 0 if used in place.
        num_shards: number of files with images.
        hours: on `data.workers` cores (dense sets: one); 0 if nothing is packed here.
        disk_bytes: peak disk space, including temporary files.
        note: which numbers are estimates, and why.
    """

    dataset: str
    num_train: int
    num_val: int
    source_bytes: int
    packed_bytes: int
    num_shards: int
    hours: float
    disk_bytes: int
    note: str


def speed_file() -> Path:
    """The file in which `vitpipe benchmark pack` stores the measured speed."""
    return cache_folder() / SPEED_FILE


def pack_speed() -> PackSpeed:
    """The speed measured on this machine, else the default.

    Raises:
        InputError: if the file of the measured speed is invalid.
    """
    path = speed_file()
    if not path.is_file():
        return PackSpeed(
            images_per_second_per_core=DEFAULT_IMAGES_PER_SECOND,
            megabytes_per_second_per_core=DEFAULT_MEGABYTES_PER_SECOND,
        )
    try:
        return PackSpeed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            "The measured packing speed cannot be read",
            where=path,
            fix="run `vitpipe benchmark pack` again, or delete the file",
        ) from error


def write_pack_speed(speed: PackSpeed) -> Path:
    """Store a measured speed for later plans; returns the file."""
    path = speed_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, speed.model_dump_json(indent=2) + "\n")
    return path


def packing_cost(data: DataConfig, speed: PackSpeed | None = None) -> list[SetCost]:
    """Cost of each dataset of the recipe, in the order of `data.sets`; zeros where the size is unknown.

    Args:
        speed: default: `pack_speed()`.

    Raises:
        InputError: if the file of the measured speed is invalid.
    """
    used, views = speed or pack_speed(), views_among(data.names)
    costs = []
    for name in data.names:
        known = sized_facts(name, data)
        if name in views:
            note = f"classes of {views[name]}, read from its shards"
            costs.append(SetCost(name, known.num_train_images, known.num_val_images, 0, 0, 0, 0.0, 0, note))
        elif not known.num_images:
            costs.append(SetCost(name, 0, 0, 0, 0, 0, 0.0, 0, UNKNOWN))
        else:
            cost = _shard_cost if known.has_classes else _dense_cost
            costs.append(cost(known, data, used))
    return costs


def plan_rows(data: DataConfig, speed: PackSpeed | None = None) -> list[dict[str, Any]]:
    """`packing_cost` as rows of numbers, for JSON output."""
    return [asdict(cost) for cost in packing_cost(data, speed)]


def shown_rows(data: DataConfig, speed: PackSpeed | None = None) -> list[dict[str, str]]:
    """`packing_cost` as rows of text, for a terminal; with several sets, the last row is the sum."""
    # Images of a class view are counted in the whole set.
    costs, views = packing_cost(data, speed), views_among(data.names)
    if len(costs) > 1:
        total = {
            name: sum(getattr(cost, name) for cost in costs if cost.dataset not in views)
            for name in ("num_train", "num_val", "source_bytes", "packed_bytes", "num_shards", "hours",
                         "disk_bytes")
        }  # fmt: skip
        costs.append(SetCost(dataset="all", note="", **total))
    return [
        {
            "set": cost.dataset,
            "train": f"{cost.num_train:,}" if cost.num_train else "—",
            "val": f"{cost.num_val:,}" if cost.num_train else "—",
            "source": format_bytes(cost.source_bytes) if cost.source_bytes else "—",
            "packed": format_bytes(cost.packed_bytes) if cost.packed_bytes else "—",
            "shards": f"{cost.num_shards:,}",
            "time": format_duration(3600 * cost.hours) if cost.hours else "—",
            "disk": format_bytes(cost.disk_bytes) if cost.disk_bytes else "—",
            "note": cost.note,
        }
        for cost in costs
    ]


def _shard_cost(known: DatasetFacts, data: DataConfig, speed: PackSpeed) -> SetCost:
    notes = ["size is an estimate"] if known.size_is_estimate else []
    image_bytes = _image_bytes(known, data, notes)
    # A split of 0 images has no shards (releases without a validation split).
    splits = [num for num in (known.num_train_images, known.num_val_images) if num]
    shard_bytes = data.shard_megabytes * 1_000_000
    packed_bytes = num_shards = 0
    for num_images in splits:
        tar_bytes = round(image_bytes * num_images / known.num_images) + _SHARD_BYTES_PER_IMAGE * num_images
        shards = math.ceil(tar_bytes / shard_bytes)
        num_shards += shards
        packed_bytes += tar_bytes + shards * _END_BYTES + _INDEX_BYTES * num_images
    num_cores, disk_bytes = max(1, num_packers(data)), packed_bytes
    hours = speed.hours(known.num_images, known.size_bytes, num_cores)
    if data.source == "embedded":
        disk_bytes += known.size_bytes  # written as folders first, then packed
    if data.source == "pinned":
        hours = 0.0
        notes.append("pulled, not packed")
    elif data.store is not None:
        notes.append(f"shards are uploaded to {data.store} when the set is complete")
    return SetCost(
        dataset=known.name,
        num_train=known.num_train_images,
        num_val=known.num_val_images,
        source_bytes=known.size_bytes,
        packed_bytes=packed_bytes,
        num_shards=num_shards,
        hours=hours,
        disk_bytes=disk_bytes,
        note="; ".join(notes),
    )


def _image_bytes(known: DatasetFacts, data: DataConfig, notes: list[str]) -> int:
    """Bytes of all images as they are packed; appends to `notes` what is estimated."""
    if known.array_side is not None:
        # CIFAR and SVHN are released as arrays (3 bytes per pixel), which have no image files to copy.
        notes.append("pixel arrays are stored as PNG, size is an estimate")
        return round(_PNG_RATIO * 3 * known.array_side**2 * known.num_images)
    if data.short_side is None or data.source == "embedded":
        return known.size_bytes
    if known.typical_short_side is None:
        notes.append(f"short side {data.short_side}: reduction unknown, the full size is shown")
        return known.size_bytes
    # JPEG bytes are taken as proportional to the number of pixels.
    ratio = min(1.0, data.short_side / known.typical_short_side) ** 2
    notes.append(
        f"short side {data.short_side}: about {ratio:.0%} of the bytes (estimate); packing is slower"
    )
    return round(ratio * known.size_bytes)


def _dense_cost(known: DatasetFacts, data: DataConfig, speed: PackSpeed) -> SetCost:
    """Cost of a dense set: one archive, written by one process, or nothing if it is used in place."""
    packed = _dense_is_packed(known.name, data)
    num_files = known.num_images * known.files_per_image
    packed_bytes = known.size_bytes + num_files * (_BLOCK + _BLOCK // 2) if packed else 0
    notes = ["size is an estimate"] if known.size_is_estimate else []
    if not packed:
        notes.append("used in place")
    if data.source == "pinned":
        notes.append("pulled, not packed")
    packs_here = packed and data.source != "pinned"
    return SetCost(
        dataset=known.name,
        num_train=known.num_train_images,
        num_val=known.num_val_images,
        source_bytes=known.size_bytes,
        packed_bytes=packed_bytes,
        num_shards=int(packed),
        hours=speed.hours(num_files, known.size_bytes, 1) if packs_here else 0.0,
        disk_bytes=packed_bytes + (known.size_bytes if data.source == "embedded" else 0),
        note="; ".join(notes),
    )


def _dense_is_packed(name: str, data: DataConfig) -> bool:
    # As `stages/prepare.py` decides, but from file names: archives are recognised without being opened.
    if data.source != "folders" or data.keep_dense == "pack":
        return True
    if data.keep_dense == "point" or data.root is None:
        return False
    return any((data.root / name).glob("*.zip"))
