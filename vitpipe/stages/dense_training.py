"""Steps that detect and segment share: train, predict, gather predictions, write the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from vitpipe.config.recipe import DenseConfig
from vitpipe.config.resolve import num_workers
from vitpipe.contracts.errors import disk_errors
from vitpipe.dense.feed import eval_loader
from vitpipe.dense.plan import DensePlan
from vitpipe.dense.runner import DenseRun
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import states_of

T = TypeVar("T")
CONFIG = "mm_config.json"


def fit_dense(
    ctx: StageContext,
    network: nn.Module,
    plan: DensePlan,
    train_set: Any,
    groups: list[int] | None = None,
    *,
    start: str = "",
) -> None:
    """Train; training states are kept in `ctx.state`.

    Args:
        network: a detector or segmentor on its device, with the weights from which training starts.
        groups: group number of each sample; samples of different groups should not be padded together. One
            group by default.
        start: origin of the weights, logged when there is no saved state to resume from.
    """
    section: DenseConfig = ctx.section
    for note in plan.notes:
        ctx.logger.say(note)
    run = DenseRun(
        network,
        section,
        plan,
        seed=ctx.recipe.seed,
        ranks=ctx.ranks,
        states=states_of(ctx),
        logger=ctx.logger,
        start=start,
    )
    run.train(train_set, groups or [0] * len(train_set), num_workers(ctx.recipe.data))


def predictions(ctx: StageContext, network: Any, val_set: Any) -> Iterator[Any]:
    """Predict this rank's share of a validation set; yields mmdet's or mmseg's samples with predictions."""
    loader = eval_loader(
        val_set,
        # The published numbers are made with one image per batch: a batch is padded to its largest image, and
        # the padding would take part in global attention.
        batch=1,
        rank=ctx.ranks.rank,
        num_ranks=ctx.ranks.num_ranks,
        workers=num_workers(ctx.recipe.data),
    )
    ctx.logger.say(f"Predicting {len(val_set)} validation images")
    network.eval()
    with torch.no_grad():
        for batch in loader:
            yield from network.test_step(batch)


def gathered(ctx: StageContext, rows: list[T]) -> list[T]:
    """Concatenate the rows of all ranks, in the order of ranks; every rank gets all."""
    if ctx.ranks.num_ranks == 1:
        return rows
    shares: list[list[T]] = [[] for _ in range(ctx.ranks.num_ranks)]
    # Ranks have different numbers of rows: they are gathered as pickled objects, not as tensors.
    dist.all_gather_object(shares, rows)
    return list(chain.from_iterable(shares))


def save_config(ctx: StageContext, **parts: Any) -> None:
    """Write the configuration that mmdet or mmseg gets as `mm_config.json` (rank 0).

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    if ctx.is_main:
        with disk_errors(ctx.folder):
            (ctx.folder / CONFIG).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
