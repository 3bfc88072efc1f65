"""Batches of tensors from shards, identical for any number of loader processes and ranks.

Shapes: B images of this rank's micro-batch, C = 3 colour channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.seeds import kept_random_state, seed_everything
from vitpipe.data.augment import Chain, Transform
from vitpipe.data.loader_processes import begin_worker
from vitpipe.data.moment import Moment
from vitpipe.data.order import Chunk, epoch_steps, eval_chunks, train_chunks


class ImageSet(Protocol):
    """Images by position: a `ShardSet`, some of its images, or the pictures of a set with annotations."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folder names in the order of the class numbers; none where all have label 0."""

    def __len__(self) -> int: ...

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See `ShardSet.decode_many`."""


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        views: (B, C, H, W) float32 each, normalised: one, or several of different size with multi-crop.
        labels_B: int64 class numbers.
        indices_B: int64 positions in the shard set. An image occurs at most once in a step, so that they name
            the draws of its images (`models.draws`).
        moment: the step that it belongs to; of evaluation batches the first one.
    """

    views: tuple[Tensor, ...]
    labels_B: Tensor  # noqa: N815
    indices_B: Tensor  # noqa: N815
    moment: Moment

    @property
    def images(self) -> Tensor:
        """The first view, (B, C, H, W)."""
        return self.views[0]

    def to(self, device: torch.device) -> Batch:
        """The batch with all its tensors on a device, copied asynchronously from pinned memory."""
        views = tuple(view.to(device, non_blocking=True) for view in self.views)
        labels_B, indices_B = (t.to(device, non_blocking=True) for t in (self.labels_B, self.indices_B))
        return Batch(views, labels_B, indices_B, self.moment)

    def key(self, what: str) -> int:
        """The key of draws that images of a micro-batch share, for one purpose; 64 bits.

        For what cannot be drawn per image: in-batch mixing, and generators of libraries. Results then depend
        on the size of the micro-batch, but not on the number of ranks.
        """
        # The first image tells the micro-batches of a step apart.
        return self.moment.key(what, int(self.indices_B[0]))

    def contents(self) -> dict[str, Any]:
        """Images, labels and positions, on the CPU."""
        return {
            "views": [view.cpu() for view in self.views],
            "labels": self.labels_B.cpu(),
            "indices": self.indices_B.cpu(),
        }


def train_batches(
    shards: ImageSet,
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

    Every draw of a sample is a function of (seed, step, index), so pixels do not depend on the number of
    loader processes or ranks, on the micro-batch, or on where a run was resumed.

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

    first = Moment(seed, start_step, num_steps, epoch_steps(len(shards), global_batch))
    return _load(_Reader(shards, transform, first, draws=True), chunks, workers)


def eval_batches(
    shards: ImageSet,
    transform: Transform,
    *,
    batch: int,
    rank: int,
    num_ranks: int,
    workers: int,
    seed: int = 0,
) -> Iterator[Batch]:
    """Every sample once over all ranks, in order; see `order.eval_chunks`.

    Args:
        transform: RGB image -> (3, H, W) float32.
        batch: B; the last batch may be smaller.
        workers: loader processes; 0 decodes in this process.
        seed: of the batches' moment, for draws of the evaluation itself such as masks.

    Raises:
        DatasetError: when an image cannot be read or decoded; the message names it.
    """

    def chunks() -> Iterator[Chunk]:
        return eval_chunks(len(shards), batch=batch, rank=rank, num_ranks=num_ranks)

    return _load(_Reader(shards, transform, Moment(seed, 0, 1, 1), draws=False), chunks, workers)


class _Reader(Dataset[Batch]):
    """Chunk -> batch. With `draws`, every sample is augmented under a random state of its own."""

    def __init__(self, shards: ImageSet, transform: Transform, moment: Moment, draws: bool) -> None:
        self.shards, self.transform, self.moment, self.draws = shards, transform, moment, draws

    def __getitem__(self, chunk: Chunk) -> Batch | VitpipeError:  # type: ignore[override]
        """The batch, or the error for the user as a value."""
        # Returned, not raised: DataLoader re-raises an error of a worker process with the worker's traceback
        # in its message, and a user's mistake must be one paragraph.
        try:
            # Without workers this runs in the training process, whose generators must stay as they are.
            with kept_random_state() if self.draws else nullcontext():
                return self._batch(chunk)
        except VitpipeError as error:
            return error

    def _batch(self, chunk: Chunk) -> Batch:
        images = _BatchImages(self.transform, len(chunk.indices))
        moment = self.moment._replace(step=chunk.step)
        labels = []
        decoded = self.shards.decode_many(chunk.indices)
        for index, (image, label) in zip(chunk.indices, decoded, strict=True):
            # Per sample, not per batch or worker: which process decodes it must not change its pixels.
            if self.draws:
                seed_everything("sample", moment.seed, moment.step, index)
            images.add(image)
            labels.append(label)
        return Batch(images.views(), torch.tensor(labels), torch.tensor(chunk.indices), moment)


class _BatchImages:
    """Transforms the images of one batch; a `Chain` writes them straight into the batch tensor."""

    def __init__(self, transform: Transform, num_images: int) -> None:
        self.transform, self.num_images = transform, num_images
        self.made: list[Any] = []
        self.batch: Tensor | None = None

    def add(self, image: Image.Image) -> None:
        """Transform the next image."""
        # Without stacking afterwards, which copies every image once more (with whole JPEGs, see
        # `decode.read_at_once`, a tenth of the data path's time).
        if not isinstance(self.transform, Chain):
            self.made.append(self.transform(image))
        elif self.batch is None:
            # Only the first image tells the size of the batch tensor.
            first = self.transform(image)
            self.batch = torch.empty(self.num_images, *first.shape)
            self.made.append(self.batch[0].copy_(first))
        else:
            self.made.append(self.transform(image, self.batch[len(self.made)]))

    def views(self) -> tuple[Tensor, ...]:
        """Every view of all images, (B, C, H, W) each."""
        if self.batch is not None:
            return (self.batch,)
        by_view = zip(*self.made, strict=True) if isinstance(self.made[0], list) else [self.made]
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
            # Pinned memory lets `Batch.to` copy asynchronously; it needs a CUDA driver.
            pin_memory=torch.cuda.is_available(),
        )
    for batch in loaded:
        if isinstance(batch, VitpipeError):
            raise batch
        yield batch


def _unchanged(batch: Batch | VitpipeError) -> Batch | VitpipeError:
    return batch
