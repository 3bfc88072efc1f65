"""The order of samples: a pure function of (seed, epoch, position).

One epoch is one permutation of the set. A global step takes the next `global_batch` positions, whatever the
number of ranks; they are cut into chunks of one micro-batch, and chunk `c` goes to rank `c % num_ranks`. So
the samples of a step, and of a chunk, are the same for 1 rank with accumulation 8 and for 8 ranks without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import generator_of
from vitpipe.contracts.units import counted


@dataclass(frozen=True, order=True)
class Chunk:
    """One micro-batch of one rank.

    Attributes:
        step: optimiser step, counted over the whole run; in evaluation always 0.
        indices: (B,) positions in the shard set, in order.
    """

    step: int
    indices: tuple[int, ...]


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The permutation of `range(num_samples)` for one epoch, (num_samples,) int64."""
    # Recomputed on every rank instead of stored or sent: 14 million samples take 0.5 s (`benchmark index`).
    # A window buffer as in WebDataset needs no permutation, but its order depends on workers and on where
    # a run was resumed.
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
    """The micro-batches of one rank from `start_step` up to `num_steps` (exclusive), in order.

    Starting at step s yields the tail of the sequence that starts at 0.

    Args:
        num_samples: size of the set.
        seed: of the run.
        global_batch: samples per optimiser step over all ranks.
        micro_batch: samples per chunk.

    Raises:
        InputError: when the global batch is not a multiple of `micro_batch * num_ranks`, or is larger
            than the set.
    """
    per_round = micro_batch * num_ranks
    if global_batch % per_round:
        raise InputError(
            f"A global batch of {global_batch} images is not a multiple of micro-batch {micro_batch} x "
            f"{num_ranks} ranks",
            fix="choose a micro-batch and a number of ranks whose product divides the global batch",
        )
    steps_per_epoch = epoch_steps(num_samples, global_batch)
    if steps_per_epoch == 0:
        raise InputError(
            f"The set has {counted(num_samples, 'image')}, fewer than one global batch of {global_batch}",
            fix="lower global_batch, or prepare more images",
        )
    # One permutation is kept at a time: 8 bytes per sample, 112 MB for 14 million.
    order, order_epoch = np.empty(0, np.int64), -1
    for step in range(start_step, num_steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(seed, epoch, num_samples), epoch
        for micro in range(global_batch // per_round):
            first = step_in_epoch * global_batch + (micro * num_ranks + rank) * micro_batch
            yield Chunk(step, tuple(order[first : first + micro_batch].tolist()))


def epoch_steps(num_samples: int, global_batch: int) -> int:
    """Optimiser steps of one epoch."""
    # The last incomplete global batch of an epoch is dropped, as in the papers' loaders: every step has the
    # batch size that its learning rate is derived from.
    return num_samples // global_batch


def eval_chunks(num_samples: int, *, batch: int, rank: int, num_ranks: int) -> Iterator[Chunk]:
    """Every sample once over all ranks, in order: batch b goes to rank `b % num_ranks`.

    Ranks may get different numbers of batches, so no collective operation may run per batch.

    Args:
        num_samples: size of the set.
        batch: samples per chunk; the last one may be smaller.
    """
    # torch's DistributedSampler pads with repeated samples, which changes the accuracy; here nothing is
    # padded and the counts are summed once at the end.
    for number, first in enumerate(range(0, num_samples, batch)):
        if number % num_ranks == rank:
            yield Chunk(0, tuple(range(first, min(first + batch, num_samples))))
