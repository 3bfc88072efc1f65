"""Data loading speed: our shards against torchvision's ImageFolder, with identical pixels, on one core.

    the same images > a folder of JPEGs, and shards packed from it > batches of tensors, in alternating rounds

Both sides run in this process on one thread, with the same draws for every image. All tensors of every path
are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitpipe.benchmarks.library_transforms import (
    Transform,
    library_crops,
    library_evaluation,
    library_training,
)
from vitpipe.benchmarks.photographs import Photographs
from vitpipe.config.multi_crop import CropsConfig
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.augment import Chain, eval_transform, train_transform
from vitpipe.data.batches import Batch, eval_batches, train_batches
from vitpipe.data.crops import MultiCrop
from vitpipe.data.manifest import ShardManifest, read_manifest
from vitpipe.data.order import epoch_order
from vitpipe.data.shards import ShardSet
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.models.draws import uniform
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import Quarantine, pack

_SHARD_BYTES = 256_000_000
_SEED = 0
# Shorter side 256, crop 224: the protocol of the papers' ImageNet rows.
_CROP_RATIO = 224 / 256
# Crop and flip with torchvision's defaults; the fine-tuning and the pre-training augmentation of iTPN.
_PLAIN = AugmentConfig()
_STRONG = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase_probability=0.25)
_MASKED = AugmentConfig(crop_scale=(0.2, 1.0))

# Label of a transform in the step table, by class name, for both sides; all other classes are "augment".
_STEPS = {
    "RandomResizedCropAndInterpolation": "crop and resize",
    "RandomResizedCrop": "crop and resize",
    "RandomHorizontalFlip": "flip",
    "RandomFlip": "flip",
    "ToTensor": "to tensor and normalise",
    "Normalize": "to tensor and normalise",
    "Normalise": "to tensor and normalise",
    "RandomErasing": "erase",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """Settings of the benchmark.

    Attributes:
        photographs: number, size and quality of the JPEGs; the number is rounded down to whole batches.
        image_size: side of the tensors in pixels.
        batch: images per batch.
        num_rounds: timed runs of each side; the median is reported.
    """

    photographs: Photographs = field(default_factory=Photographs)
    image_size: int = 224
    batch: int = 32
    num_rounds: int = 5


@dataclass(frozen=True)
class PathSpeed:
    """Speed of one path on both sides, in images per second on one core, and the comparison of pixels."""

    path: str
    folder_images_per_second: float
    shards_images_per_second: float
    num_compared: int
    num_different: int

    @property
    def ratio(self) -> float:
        """Speed of the shards over that of ImageFolder."""
        return self.shards_images_per_second / self.folder_images_per_second


@dataclass(frozen=True)
class StepShare:
    """Mean time of one transform per image in milliseconds, on both sides; 0 for a side without it."""

    step: str
    folder_ms: float
    shards_ms: float


@dataclass(frozen=True)
class DataPath:
    """One kind of batches, made in two ways.

    Attributes:
        ours: transform of an RGB image for the shards.
        theirs: the reference made of the libraries' own classes, for ImageFolder.
        trains: batches in the shuffled order of an epoch and with draws; else in order and without.
        num_units: units per image for which mask noise is drawn; 0 without masked pre-training.
    """

    name: str
    ours: Transform
    theirs: Transform
    trains: bool = True
    num_units: int = 0


def measure_paths(root: Path, setting: Setting, say: Say) -> list[PathSpeed]:
    """Compare the pixels of every path, then time it.

    Args:
        root: a folder with train/ and val/ written by `photographs.write`, and space for shards.
        say: receives what is being measured.
    """
    folder, shards = _both_sides(root)
    return [_measure(path, folder, shards, setting, say) for path in data_paths(setting)]


def measure_shares(root: Path, setting: Setting) -> list[StepShare]:
    """Time per image of every transform of the fine-tuning path, on both sides."""
    folder, shards = _both_sides(root)
    path = next(path for path in data_paths(setting) if path.name == "fine-tuning")
    theirs: dict[str, float] = {}
    ours: dict[str, float] = {}
    # Image by image, both sides with the same draws, so that the same operations of RandAugment are timed.
    for position in range(len(shards)):
        seed_everything(position)
        with _timed(theirs, "read and decode"):
            image = folder.loader(folder.samples[position][0])
        _run_timed(theirs, path.theirs.transforms, image)  # type: ignore[attr-defined]
        seed_everything(position)
        with _timed(ours, "read and decode"):
            image, _ = shards.decode(position)
        assert isinstance(path.ours, Chain)
        _run_timed(ours, path.ours.steps, image)
    return [
        StepShare(step, theirs.get(step, 0.0) / len(shards), ours.get(step, 0.0) / len(shards))
        for step in dict.fromkeys([*theirs, *ours])
    ]


def data_paths(setting: Setting) -> list[DataPath]:
    """All paths: crop and flip, masked pre-training, fine-tuning, multi-crop, evaluation."""
    size, crops = setting.image_size, CropsConfig(global_size=setting.image_size)
    return [
        DataPath("crop and flip", train_transform(_PLAIN, size), library_training(_PLAIN, size)),
        DataPath(
            "masked pre-training",
            train_transform(_MASKED, size),
            library_training(_MASKED, size),
            num_units=(size // UNIT_PIXELS) ** 2,
        ),
        DataPath("fine-tuning", train_transform(_STRONG, size), library_training(_STRONG, size)),
        DataPath("multi-crop 2 + 8", MultiCrop(crops), library_crops(crops)),
        DataPath(
            "evaluation",
            eval_transform(size, _CROP_RATIO, _PLAIN),
            library_evaluation(size, _CROP_RATIO, _PLAIN),
            trains=False,
        ),
    ]


def _both_sides(root: Path) -> tuple[Any, ShardSet]:
    from torchvision.datasets import ImageFolder

    out = root / "shards"
    source = read_class_folders(root, "imagenet")
    options = PackOptions(_SHARD_BYTES)
    # Packed once for speeds and shares.
    if not out.exists():
        pack(source, out, options=options, quarantine=Quarantine(0), scratch=root / "scratch")
    return ImageFolder(str(root / "train")), ShardSet(out, read_manifest(out, ShardManifest), "train")


def _measure(path: DataPath, folder: Any, shards: ShardSet, setting: Setting, say: Say) -> PathSpeed:
    say(f"{path.name}: comparing pixels")
    num_different = sum(
        not _same(ours, theirs)
        for ours, theirs in zip(
            _our_images(path, shards, setting), _their_images(path, folder, setting), strict=True
        )
    )
    num_compared = _num_steps(setting) * setting.batch
    # Sides alternate, so that the load of a shared machine affects both alike; hence medians, too.
    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(setting.num_rounds):
        say(f"{path.name}: round {number + 1} of {setting.num_rounds}")
        sides = (lambda: _their_batches(path, folder, setting), lambda: _our_batches(path, shards, setting))
        for side, batches in enumerate(sides):
            started = time.perf_counter()
            num_batches = sum(1 for _ in batches())
            speeds[side].append(num_batches * setting.batch / (time.perf_counter() - started))
    return PathSpeed(
        path.name, statistics.median(speeds[0]), statistics.median(speeds[1]), num_compared, num_different
    )


def _our_batches(path: DataPath, shards: ShardSet, setting: Setting) -> Iterator[Batch]:
    num_steps, batch = _num_steps(setting), setting.batch
    if not path.trains:
        # ImageFolder's side has whole batches only.
        evaluated = eval_batches(shards, path.ours, batch=batch, rank=0, num_ranks=1, workers=0)
        yield from (part for part in evaluated if len(part.indices_B) == batch)
        return
    batches = train_batches(
        shards, path.ours, seed=_SEED, global_batch=batch, micro_batch=batch, rank=0, num_ranks=1,
        start_step=0, num_steps=num_steps, workers=0,
    )  # fmt: skip
    for part in batches:
        if path.num_units:
            uniform(part.moment.key("mask"), part.indices_B, path.num_units)
        yield part


def _their_batches(path: DataPath, folder: Any, setting: Setting) -> Iterator[Any]:
    from torch.utils.data import default_collate

    positions = _positions(path, len(folder), setting)
    # By hand, because DataLoader's sampler would shuffle in another order.
    for first in range(0, len(positions), setting.batch):
        samples = []
        for position in positions[first : first + setting.batch]:
            image, label = folder[position]
            samples.append((path.theirs(image), label))
        # The same amount of noise as on our side, as MAE's code draws it in the network.
        if path.num_units:
            torch.rand(setting.batch, path.num_units)
        yield default_collate(samples)


def _our_images(path: DataPath, shards: ShardSet, setting: Setting) -> Iterator[Sequence[Tensor]]:
    for part in _our_batches(path, shards, setting):
        yield from ([view[number] for view in part.views] for number in range(setting.batch))


def _their_images(path: DataPath, folder: Any, setting: Setting) -> Iterator[Sequence[Tensor]]:
    for number, position in enumerate(_positions(path, len(folder), setting)):
        step = number // setting.batch
        image, _ = folder[position]
        # The seed of `data.batches` for this sample, so that both sides draw the same.
        if path.trains:
            seed_everything("sample", _SEED, step, position)
        made = path.theirs(image)
        yield [made] if isinstance(made, Tensor) else made


def _positions(path: DataPath, num_images: int, setting: Setting) -> list[int]:
    num_timed = _num_steps(setting) * setting.batch
    order = epoch_order(_SEED, 0, num_images) if path.trains else np.arange(num_images)
    positions: list[int] = order[:num_timed].tolist()
    return positions


def _num_steps(setting: Setting) -> int:
    return setting.photographs.number // setting.batch


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@contextmanager
def _timed(account: dict[str, float], step: str) -> Iterator[None]:
    """Add the duration of the block in milliseconds to `account[step]`."""
    started = time.perf_counter()
    yield
    account[step] = account.get(step, 0.0) + 1000.0 * (time.perf_counter() - started)


def _run_timed(account: dict[str, float], steps: Sequence[Callable[[Any], Any]], value: Any) -> None:
    for step in steps:
        with _timed(account, _STEPS.get(type(step).__name__, "augment")):
            value = step(value)
