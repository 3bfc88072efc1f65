"""Batches of tensors from shards, identical for any number of loader processes and ranks.

Shapes: B images of this rank's micro-batch, C = 3 colour channels, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from multiprocessing import parent_process
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.processes import die_with_parent
from vitpipe.contracts.seeds import kept_random_state, seed_everything
from vitpipe.data.augment import Chain, Transform
from vitpipe.data.order import Chunk, eval_chunks, train_chunks
from vitpipe.data.shards import ShardSet


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        images_BCHW: float32, normalised; with multi-crop the first view.
        labels_B: int64 class numbers.
        indices_B: int64 positions in the shard set.
        step: optimiser step, counted over the whole run.
        micro: accumulation index within the step on this rank.
        chunk: index of the micro-batch within the step over all ranks. Seeds are derived from it and not
            from rank and `micro`, so that they do not depend on the number of ranks.
        views: all views of multi-crop, (B, C, S, S) each; empty for a transform that returns one tensor.
    """

    images_BCHW: Tensor  # noqa: N815
    labels_B: Tensor  # noqa: N815
    indices_B: Tensor  # noqa: N815
    step: int
    micro: int
    chunk: int
    views: tuple[Tensor, ...] = ()


def train_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    start_step: int,
    num_steps: int,
    workers: int,
) -> Iterator[Batch]:
    """This rank's micro-batches from `start_step` up to `num_steps` (exclusive), in order.

    Every draw of a sample is a function of (seed, epoch, position), so pixels do not depend on the number
    of loader processes or ranks, or on where a run was resumed.

    Args:
        transform: RGB image -> (3, H, W) float32, or a list of such views.
        seed: of the run.
        global_batch: images per optimiser step over all ranks.
        micro_batch: B.
        num_steps: total steps of the run; the last yielded step is `num_steps - 1`.
        workers: loader processes; 0 decodes in this process.

    Raises:
        DatasetError: when an image cannot be read or decoded; the message names it.
        InputError: as `order.train_chunks`.
    """

    def chunks() -> Iterator[Chunk]:
        return train_chunks(
            len(shards),
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            num_ranks=num_ranks,
            start_step=start_step,
            num_steps=num_steps,
        )

    return _load(_Reader(shards, transform, seed), chunks, workers)


def eval_batches(
    shards: ShardSet, transform: Transform, *, batch: int, rank: int, num_ranks: int, workers: int
) -> Iterator[Batch]:
    """Every sample once over all ranks, in order; see `order.eval_chunks`.

    Args:
        transform: RGB image -> (3, H, W) float32.
        batch: B; the last batch may be smaller.
        workers: loader processes; 0 decodes in this process.

    Raises:
        DatasetError: when an image cannot be read or decoded; the message names it.
    """

    def chunks() -> Iterator[Chunk]:
        return eval_chunks(len(shards), batch=batch, rank=rank, num_ranks=num_ranks)

    return _load(_Reader(shards, transform, None), chunks, workers)


class _Reader(Dataset[Batch]):
    """Chunk -> batch. With a seed, every sample is augmented under a random state of its own."""

    def __init__(self, shards: ShardSet, transform: Transform, seed: int | None) -> None:
        self.shards, self.transform, self.seed = shards, transform, seed

    def __getitem__(self, chunk: Chunk) -> Batch | VitpipeError:  # type: ignore[override]
        """The batch, or the error for the user as a value."""
        # Returned, not raised: DataLoader re-raises an error of a worker process with the worker's traceback
        # in its message, and a user's mistake must be one paragraph.
        try:
            # Without workers this runs in the training process, whose generators must stay as they are.
            with nullcontext() if self.seed is None else kept_random_state():
                return self._batch(chunk)
        except VitpipeError as error:
            return error

    def _batch(self, chunk: Chunk) -> Batch:
        images = _BatchImages(self.transform, len(chunk.indices))
        labels = []
        for offset, (image, label) in enumerate(self.shards.decode_many(chunk.indices)):
            # Per sample, not per batch or worker: which process decodes it must not change its pixels.
            if self.seed is not None:
                seed_everything("sample", self.seed, chunk.epoch, chunk.first_position + offset)
            images.add(image)
            labels.append(label)
        views = images.views()
        return Batch(
            views[0],
            torch.tensor(labels),
            torch.tensor(chunk.indices),
            chunk.step,
            chunk.micro,
            chunk.number,
            views if images.is_multi_view else (),
        )


class _BatchImages:
    """Transforms the images of one batch; a `Chain` writes them straight into the batch tensor."""

    def __init__(self, transform: Transform, num_images: int) -> None:
        self.transform, self.num_images = transform, num_images
        self.made: list[Any] = []
        self.batch: Tensor | None = None

    def add(self, image: Image.Image) -> None:
        """Transform the next image."""
        # Without stacking afterwards, which copies every image once more (with whole JPEGs, see
        # `shards.read_at_once`, a tenth of the data path's time).
        if not isinstance(self.transform, Chain):
            self.made.append(self.transform(image))
        elif self.batch is None:
            # Only the first image tells the size of the batch tensor.
            first = self.transform(image)
            self.batch = torch.empty(self.num_images, *first.shape)
            self.made.append(self.batch[0].copy_(first))
        else:
            self.made.append(self.transform(image, self.batch[len(self.made)]))

    @property
    def is_multi_view(self) -> bool:
        """Whether the transform returns several views per image."""
        return isinstance(self.made[0], list)

    def views(self) -> tuple[Tensor, ...]:
        """Every view of all images, (B, C, H, W) each."""
        if self.batch is not None:
            return (self.batch,)
        by_view = zip(*self.made, strict=True) if self.is_multi_view else [self.made]
        return tuple(torch.stack(tuple(view)) for view in by_view)


class _Chunks(Iterable[Chunk]):
    """A sampler for DataLoader that yields whole micro-batches instead of single positions."""

    def __init__(self, chunks: Callable[[], Iterator[Chunk]]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self.chunks()


def _load(reader: _Reader, chunks: Callable[[], Iterator[Chunk]], workers: int) -> Iterator[Batch]:
    loaded: Iterable[Batch | VitpipeError]
    if workers == 0:
        loaded = (reader[chunk] for chunk in chunks())
    else:
        loaded = DataLoader(
            reader,
            # No automatic batching: a chunk is a batch, so that a worker reads a whole batch at once.
            batch_size=None,
            sampler=_Chunks(chunks),
            num_workers=workers,
            # torch's default_convert would walk through the tuple and rebuild it.
            collate_fn=_unchanged,  # type: ignore[arg-type]  # with batch_size None it gets single items
            # DataLoader draws a base seed for its workers, by default from the training process's generator.
            generator=torch.Generator(),
            worker_init_fn=begin_worker,
            # Pinned memory lets `Ranks.to_device` copy asynchronously; it needs a CUDA driver.
            pin_memory=torch.cuda.is_available(),
        )
    for batch in loaded:
        if isinstance(batch, VitpipeError):
            raise batch
        yield batch


def begin_worker(worker: int) -> None:
    """Move a loader process to a process group of its own (`worker_init_fn` of a DataLoader)."""
    # A scheduler or Ctrl-C signals the whole group. The trainer finishes its step and saves; a worker that
    # was killed meanwhile would make DataLoader raise before that.
    os.setpgid(0, 0)
    # A `kill -9` of the trainer's group no longer reaches this process. It would wait for ever, with half a
    # gigabyte of memory, so the kernel ends it with its parent.
    trainer = parent_process()
    if trainer is not None and trainer.pid is not None:
        die_with_parent(trainer.pid)


def _unchanged(batch: Batch | VitpipeError) -> Batch | VitpipeError:
    return batch
