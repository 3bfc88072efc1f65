"""Time and memory to open and shuffle a set of 14 million images (ImageNet-22K).

The set is synthetic: an index in the real format, a manifest, and shards as sparse files of the right sizes.
Each measurement runs in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from vitpipe.benchmarks.process_memory import peak_resident_mb
from vitpipe.contracts.errors import RunError
from vitpipe.data.manifest import (
    Shard,
    ShardManifest,
    SplitManifest,
    content_digest,
    write_manifest,
)
from vitpipe.data.order import epoch_order, train_chunks
from vitpipe.data.shards import INDEX_DTYPE, open_shards

# About the mean of ImageNet's training images.
_IMAGE_BYTES = 110_000
_SHARD_BYTES = 256_000_000
_BLOCK = 512  # of a tar file
# The global batch of iTPN's pre-training, in micro-batches of one of 8 GPUs.
_GLOBAL_BATCH = 4096
_MICRO_BATCH = 128
_DATASET = "imagenet22k"

Say = Callable[[str], None]


@dataclass(frozen=True)
class IndexCost:
    """Cost in a fresh process after imports. Times in seconds, memory in MB (10^6 bytes).

    Attributes:
        open_seconds: to read the manifest, list shard sizes and map the index.
        shuffle_seconds: to compute the permutation of one epoch.
        steps_seconds: to compute the positions and read the labels of 100 global steps of 4,096 images from
            the middle of an epoch on, as after resuming, the permutation included.
        imports_mb: peak resident size before anything is opened.
        peak_mb: peak resident size at the end.
    """

    num_images: int
    num_shards: int
    index_mb: float
    open_seconds: float
    shuffle_seconds: float
    steps_seconds: float
    imports_mb: float
    peak_mb: float


def write_synthetic_set(prepare_folder: Path, num_images: int, num_classes: int) -> int:
    """Write index, manifest and sparse shards of a set of any size; returns the number of shards."""
    folder = prepare_folder / _DATASET
    folder.mkdir(parents=True)
    per_shard = _SHARD_BYTES // _IMAGE_BYTES
    # Per image a header, the padded image, and a member with the class number: header and one block.
    stride = -(-_IMAGE_BYTES // _BLOCK) * _BLOCK + 3 * _BLOCK
    positions = np.arange(num_images)
    records = np.zeros(num_images, INDEX_DTYPE)
    records["shard"] = positions // per_shard
    records["offset"] = positions % per_shard * stride + _BLOCK
    records["size"] = _IMAGE_BYTES
    records["label"] = positions * num_classes // num_images
    records.tofile(folder / "train.index")
    shards = []
    for number in range(-(-num_images // per_shard)):
        count = min(per_shard, num_images - number * per_shard)
        shard = Shard(
            name=f"train-{number:06d}.tar",
            num_images=count,
            size_bytes=count * stride + 2 * _BLOCK,  # a tar ends with two empty blocks
            sha256="0" * 64,
        )
        # Sparse: opening compares sizes only, and 14 million images would take 1.5 TB.
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.size_bytes)
        shards.append(shard)
    manifest = ShardManifest(
        dataset=_DATASET,
        classes=tuple(f"n{number:08d}" for number in range(num_classes)),
        splits={
            "train": SplitManifest(
                num_images=num_images,
                images_per_class=tuple(np.bincount(records["label"], minlength=num_classes).tolist()),
                index="train.index",
                index_sha256="0" * 64,
                shards=tuple(shards),
            )
        },
        digest="",
    )
    write_manifest(folder, manifest.model_copy(update={"digest": content_digest(manifest)}))
    return len(shards)


def measure_index(prepare_folder: Path, num_rounds: int, say: Say) -> list[IndexCost]:
    """Open and shuffle the synthetic set `num_rounds` times.

    Args:
        prepare_folder: written by `write_synthetic_set`.
        say: receives what is being measured.

    Raises:
        RunError: when a measuring process exits without a result.
    """
    costs = []
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        # spawn: a forked process would start with this one's memory.
        context = get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_open_and_shuffle, args=(prepare_folder, sender))
        process.start()
        sender.close()  # else `recv` would wait for ever after the process has exited
        try:
            costs.append(receiver.recv())
        except EOFError as error:
            raise RunError(
                "The measuring process exited without a result",
                where="benchmark index",
                fix="correct the error that it printed above, or measure fewer --entries",
            ) from error
        finally:
            process.join()
    return costs


def _open_and_shuffle(prepare_folder: Path, sender: Connection) -> None:
    imports_mb = peak_resident_mb()
    started = time.perf_counter()
    shards = open_shards(prepare_folder, _DATASET, "train")
    opened = time.perf_counter()
    epoch_order(0, 0, len(shards))
    shuffled = time.perf_counter()
    middle = len(shards) // _GLOBAL_BATCH // 2
    chunks = train_chunks(
        len(shards), seed=0, global_batch=_GLOBAL_BATCH, micro_batch=_MICRO_BATCH, rank=3, num_ranks=8,
        start_step=middle, num_steps=middle + 100,
    )  # fmt: skip
    labels = shards.labels
    for chunk in islice(chunks, 100):
        labels[list(chunk.indices)].sum()
    stepped = time.perf_counter()
    sender.send(
        IndexCost(
            num_images=len(shards),
            num_shards=len(shards.manifest.shards),
            index_mb=len(shards) * INDEX_DTYPE.itemsize / 1e6,
            open_seconds=opened - started,
            shuffle_seconds=shuffled - opened,
            steps_seconds=stepped - shuffled,
            imports_mb=imports_mb,
            peak_mb=peak_resident_mb(),
        )
    )
