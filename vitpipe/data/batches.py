"""Batches of tensors from shards, in the order of `order`, the same for any number of workers and ranks.

B batch of this rank's micro-batch, C = 3 colours, H and W pixels.
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
        images_BCHW: float32, normalised; the first view where there are several.
        labels_B: int64 class numbers.
        indices_B: int64 positions in the shard set.
        step, micro: optimiser step and accumulation index on this rank.
        chunk: index of the micro-batch within the step over all ranks; seeds that should not depend on
            the number of ranks are made from it.
        views: all views of multi-crop, each (B, C, S, S); empty where a transform makes one tensor.
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
    """This rank's micro-batches from `start_step` up to `num_steps`, `accumulation` per step, in order.

    Every random draw of a sample is a function of (seed, epoch, position), so pixels do not depend on
    workers, ranks, or on where the run was resumed.

    Args:
        num_steps: total steps of the run; the last yielded step is `num_steps - 1`.
        workers: loader processes; 0 decodes in this one.

    Raises:
        DatasetError: naming the image, when one cannot be read or decoded.
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
    """Every sample once over all ranks, in order, none repeated; see `order.eval_chunks`.

    Raises:
        DatasetError: naming the image, when one cannot be read or decoded.
    """

    def chunks() -> Iterator[Chunk]:
        return eval_chunks(len(shards), batch=batch, rank=rank, num_ranks=num_ranks)

    return _load(_Reader(shards, transform, None), chunks, workers)


class _Reader(Dataset[Batch]):
    """Chunk in, batch out. With a seed, every sample is augmented under its own random state."""

    def __init__(self, shards: ShardSet, transform: Transform, seed: int | None) -> None:
        self.shards, self.transform, self.seed = shards, transform, seed

    def __getitem__(self, chunk: Chunk) -> Batch | VitpipeError:  # type: ignore[override]
        """The batch, or the user's error: raised in a worker it would come back wrapped in a traceback."""
        try:
            with nullcontext() if self.seed is None else kept_random_state():
                return self._batch(chunk)
        except VitpipeError as error:
            return error

    def _batch(self, chunk: Chunk) -> Batch:
        images = _Images(self.transform, len(chunk.indices))
        labels = []
        for offset, (image, label) in enumerate(self.shards.decode_many(chunk.indices)):
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
            views if images.are_several else (),
        )


class _Images:
    """The transformed images of one batch; where the transform can, written straight into their places."""

    def __init__(self, transform: Transform, num_images: int) -> None:
        self.transform, self.num_images = transform, num_images
        self.made: list[Any] = []
        self.batch: Tensor | None = None

    def add(self, image: Image.Image) -> None:
        """Transform the next image."""
        if not isinstance(self.transform, Chain):
            self.made.append(self.transform(image))
        elif self.batch is None:
            first = self.transform(image)
            self.batch = torch.empty(self.num_images, *first.shape)
            self.made.append(self.batch[0].copy_(first))
        else:
            self.made.append(self.transform(image, self.batch[len(self.made)]))

    @property
    def are_several(self) -> bool:
        """Does the transform make several views?"""
        return isinstance(self.made[0], list)

    def views(self) -> tuple[Tensor, ...]:
        """Every view of all images, (B, C, H, W) each."""
        if self.batch is not None:
            return (self.batch,)
        by_view = zip(*self.made, strict=True) if self.are_several else [self.made]
        return tuple(torch.stack(tuple(view)) for view in by_view)


class _Chunks(Iterable[Chunk]):
    """What DataLoader takes for a sampler: hands out whole micro-batches."""

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
            batch_size=None,
            sampler=_Chunks(chunks),
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # with batch_size None it gets single items
            # Its own generator: the loader would otherwise draw from that of the training process.
            generator=torch.Generator(),
            worker_init_fn=begin_worker,
            pin_memory=torch.cuda.is_available(),
        )
    for batch in loaded:
        if isinstance(batch, VitpipeError):
            raise batch
        yield batch


def begin_worker(worker: int) -> None:
    """Take a loader process out of the trainer's process group (`worker_init_fn` of a DataLoader).

    A signal to the group, from a scheduler or the keyboard, is the trainer's to answer: it finishes its
    step and saves. The workers end when it does; a `kill -9` of the group does not reach them, so the kernel
    is asked to.
    """
    os.setpgid(0, 0)
    trainer = parent_process()
    if trainer is not None and trainer.pid is not None:
        die_with_parent(trainer.pid)


def _as_it_is(batch: Batch | VitpipeError) -> Batch | VitpipeError:
    return batch
