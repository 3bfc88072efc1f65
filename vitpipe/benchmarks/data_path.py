"""How fast images come: our shards beside torchvision's ImageFolder, the same pixels, one core, one run.

    the same pictures > a folder of JPEGs, and shards packed from it > batches of tensors, in turns

Both sides run in this process on one thread, with the same draws for every image, and every tensor of
every path is compared before anything is timed.
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
from vitpipe.config.recipe import AugmentConfig, CropsConfig
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.augment import Chain, eval_transform, train_transform
from vitpipe.data.batches import Batch, eval_batches, train_batches
from vitpipe.data.crops import MultiCrop
from vitpipe.data.manifest import ShardManifest, read_manifest
from vitpipe.data.masks import mask_noise
from vitpipe.data.order import epoch_order
from vitpipe.data.shards import ShardSet
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import Quarantine, pack

_SHARD_BYTES = 256_000_000
_SEED = 0
_CROP_RATIO = 224 / 256
_UNIT_PIXELS = 16
_PLAIN = AugmentConfig()
_STRONG = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase_probability=0.25)
_MASKED = AugmentConfig(crop_scale=(0.2, 1.0))

# Classes of both sides, by what they do; all others augment.
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
    """What is measured.

    Attributes:
        photographs: number, size and quality of the JPEGs; the number is rounded down to whole batches.
        image_size: side of the tensors in pixels.
        batch: images per batch.
        num_rounds: how often each side runs; the median counts.
    """

    photographs: Photographs = field(default_factory=Photographs)
    image_size: int = 224
    batch: int = 32
    num_rounds: int = 5


@dataclass(frozen=True)
class PathSpeed:
    """One way of making batches. Speeds in images per second on one core."""

    path: str
    folder_images_per_second: float
    shards_images_per_second: float
    num_compared: int
    num_different: int

    @property
    def ratio(self) -> float:
        """How many times as fast the shards are."""
        return self.shards_images_per_second / self.folder_images_per_second


@dataclass(frozen=True)
class StepShare:
    """Mean time of one step per image, in milliseconds, on both sides; 0 where a side has no such step."""

    step: str
    folder_ms: float
    shards_ms: float


@dataclass(frozen=True)
class Way:
    """A path of the benchmark.

    Attributes:
        ours: transform of an RGB image for the shards.
        theirs: the same of the libraries' own classes, for ImageFolder.
        trains: batches in the order of an epoch with draws; else in order without.
        num_masked: patches that are given noise, for masked pre-training; 0 for none.
    """

    name: str
    ours: Transform
    theirs: Transform
    trains: bool = True
    num_masked: int = 0


def measure_paths(root: Path, setting: Setting, say: Say) -> list[PathSpeed]:
    """Compare and time every path.

    Args:
        root: a folder with train/ and val/ of `photographs.write`, and room for shards.
    """
    folder, shards = _both_sides(root)
    return [_measure(way, folder, shards, setting, say) for way in ways(setting)]


def measure_shares(root: Path, setting: Setting) -> list[StepShare]:
    """Where the time of fine-tuning's path goes, step by step, on both sides."""
    folder, shards = _both_sides(root)
    way = next(way for way in ways(setting) if way.name == "fine-tuning")
    theirs: dict[str, float] = {}
    ours: dict[str, float] = {}
    for position in range(len(shards)):
        seed_everything(position)
        with _timed(theirs, "read and decode"):
            image = folder.loader(folder.samples[position][0])
        _run_timed(theirs, way.theirs.transforms, image)  # type: ignore[attr-defined]
        seed_everything(position)
        with _timed(ours, "read and decode"):
            image, _ = shards.decode(position)
        assert isinstance(way.ours, Chain)
        _run_timed(ours, way.ours.steps, image)
    return [
        StepShare(step, theirs.get(step, 0.0) / len(shards), ours.get(step, 0.0) / len(shards))
        for step in dict.fromkeys([*theirs, *ours])
    ]


def ways(setting: Setting) -> list[Way]:
    """All paths: plain crops, masked pre-training, fine-tuning, multi-crop and evaluation."""
    size, crops = setting.image_size, CropsConfig(global_size=setting.image_size)
    return [
        Way("crop and flip", train_transform(_PLAIN, size), library_training(_PLAIN, size)),
        Way(
            "masked pre-training",
            train_transform(_MASKED, size),
            library_training(_MASKED, size),
            num_masked=(size // _UNIT_PIXELS) ** 2,
        ),
        Way("fine-tuning", train_transform(_STRONG, size), library_training(_STRONG, size)),
        Way("multi-crop 2 + 8", MultiCrop(crops), library_crops(crops)),
        Way(
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
    if not out.exists():
        pack(source, out, options=options, quarantine=Quarantine(0), scratch=root / "scratch")
    return ImageFolder(str(root / "train")), ShardSet(out, read_manifest(out, ShardManifest), "train")


def _measure(way: Way, folder: Any, shards: ShardSet, setting: Setting, say: Say) -> PathSpeed:
    say(f"{way.name}: comparing pixels")
    num_different = sum(
        not _same(ours, theirs)
        for ours, theirs in zip(
            _our_images(way, shards, setting), _their_images(way, folder, setting), strict=True
        )
    )
    num_compared = _num_steps(setting) * setting.batch
    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(setting.num_rounds):
        say(f"{way.name}: round {number + 1} of {setting.num_rounds}")
        sides = (lambda: _their_batches(way, folder, setting), lambda: _our_batches(way, shards, setting))
        for side, batches in enumerate(sides):
            started = time.perf_counter()
            num_batches = sum(1 for _ in batches())
            speeds[side].append(num_batches * setting.batch / (time.perf_counter() - started))
    return PathSpeed(
        way.name, statistics.median(speeds[0]), statistics.median(speeds[1]), num_compared, num_different
    )


def _our_batches(way: Way, shards: ShardSet, setting: Setting) -> Iterator[Batch]:
    num_steps, batch = _num_steps(setting), setting.batch
    if not way.trains:
        evaluated = eval_batches(shards, way.ours, batch=batch, rank=0, num_ranks=1, workers=0)
        yield from (part for part in evaluated if len(part.indices_B) == batch)
        return
    batches = train_batches(
        shards, way.ours, seed=_SEED, global_batch=batch, micro_batch=batch, rank=0, num_ranks=1,
        start_step=0, num_steps=num_steps, workers=0,
    )  # fmt: skip
    for part in batches:
        if way.num_masked:
            mask_noise(batch, way.num_masked, seed=_SEED, step=part.step, micro=part.micro, rank=0)
        yield part


def _their_batches(way: Way, folder: Any, setting: Setting) -> Iterator[Any]:
    from torch.utils.data import default_collate

    positions = _positions(way, len(folder), setting)
    for first in range(0, len(positions), setting.batch):
        samples = []
        for position in positions[first : first + setting.batch]:
            image, label = folder[position]
            samples.append((way.theirs(image), label))
        if way.num_masked:
            torch.rand(setting.batch, way.num_masked)
        yield default_collate(samples)


def _our_images(way: Way, shards: ShardSet, setting: Setting) -> Iterator[Sequence[Tensor]]:
    for part in _our_batches(way, shards, setting):
        views = part.views or (part.images_BCHW,)
        yield from ([view[number] for view in views] for number in range(setting.batch))


def _their_images(way: Way, folder: Any, setting: Setting) -> Iterator[Sequence[Tensor]]:
    for number, position in enumerate(_positions(way, len(folder), setting)):
        image, _ = folder[position]
        if way.trains:
            seed_everything("sample", _SEED, 0, number)
        made = way.theirs(image)
        yield [made] if isinstance(made, Tensor) else made


def _positions(way: Way, num_images: int, setting: Setting) -> list[int]:
    num_timed = _num_steps(setting) * setting.batch
    order = epoch_order(_SEED, 0, num_images) if way.trains else np.arange(num_images)
    positions: list[int] = order[:num_timed].tolist()
    return positions


def _num_steps(setting: Setting) -> int:
    return setting.photographs.number // setting.batch


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@contextmanager
def _timed(account: dict[str, float], step: str) -> Iterator[None]:
    """Add the milliseconds of the block to a step's account."""
    started = time.perf_counter()
    yield
    account[step] = account.get(step, 0.0) + 1000.0 * (time.perf_counter() - started)


def _run_timed(account: dict[str, float], steps: Sequence[Callable[[Any], Any]], value: Any) -> None:
    for step in steps:
        with _timed(account, _STEPS.get(type(step).__name__, "augment")):
            value = step(value)
