"""Which sample is seen when: a pure function of (seed, epoch, position).

One epoch is one permutation of the set; the rest that does not fill a global batch is dropped, as in
the papers' loaders. A global step takes the next `global_batch` positions whatever the number of ranks;
those are cut into chunks of one micro-batch, and chunk `c` goes to rank `c % num_ranks`. So the samples
of a step, and of a chunk, are the same for 1 rank with accumulation 8 and for 8 ranks without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import generator_of


@dataclass(frozen=True)
class Chunk:
    """One micro-batch of one rank.

    Attributes:
        step: optimiser step, counted over the whole run.
        micro: accumulation index within the step on this rank.
        number: index of the chunk within the step over all ranks, `micro * num_ranks + rank`.
        epoch: epoch number from 0.
        first_position: position of the first sample within the epoch.
        indices: samples in order, as positions in the shard set, (B,).
    """

    step: int
    micro: int
    number: int
    epoch: int
    first_position: int
    indices: tuple[int, ...]


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The permutation of `range(num_samples)` for one epoch, (num_samples,)."""
    return generator_of("order", seed, epoch).permutation(num_samples)


def train_chunks(
    num_samples: int,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    start_step: int,
    num_steps: int,
) -> Iterator[Chunk]:
    """The micro-batches of one rank from `start_step` up to `num_steps`, in order.

    Starting at step s yields exactly the tail of the undisturbed sequence.

    Raises:
        InputError: when the global batch is not a whole number of micro-batches per rank, or is larger
            than the set.
    """
    per_round = micro_batch * num_ranks
    if global_batch % per_round:
        raise InputError(
            f"A global batch of {global_batch} images is no multiple of {micro_batch} x {num_ranks} ranks",
            fix="choose a micro-batch and a number of ranks whose product divides the global batch",
        )
    steps_per_epoch = num_samples // global_batch
    if steps_per_epoch == 0:
        raise InputError(
            f"The set has {num_samples} images, fewer than one global batch of {global_batch}",
            fix="lower global_batch or give more images",
        )
    order, order_epoch = np.empty(0, np.int64), -1
    for step in range(start_step, num_steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(seed, epoch, num_samples), epoch
        for micro in range(global_batch // per_round):
            number = micro * num_ranks + rank
            first = step_in_epoch * global_batch + number * micro_batch
            indices = tuple(order[first : first + micro_batch].tolist())
            yield Chunk(step, micro, number, epoch, first, indices)


def eval_chunks(num_samples: int, *, batch: int, rank: int, num_ranks: int) -> Iterator[Chunk]:
    """All samples once over all ranks, in order: batch b goes to rank `b % num_ranks`, none is repeated.

    Ranks may get different numbers of batches, so nothing collective may be called per batch.
    """
    for number, first in enumerate(range(0, num_samples, batch)):
        if number % num_ranks == rank:
            indices = tuple(range(first, min(first + batch, num_samples)))
            yield Chunk(number, 0, number, 0, first, indices)
