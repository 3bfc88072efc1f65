"""What detect and segment share: from a network and a dataset to trained weights and predictions."""

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
from vitpipe.train.ranks import Ranks

T = TypeVar("T")
CONFIG = "mm_config.json"


def fit_dense(
    ctx: StageContext,
    network: nn.Module,
    plan: DensePlan,
    train_set: Any,
    ranks: Ranks,
    groups: list[int] | None = None,
    *,
    start: str = "",
) -> None:
    """Train; states are kept in `ctx.state`.

    Args:
        groups: of samples that are better not padded together; one group by default.
        start: what the weights are, said when there is no state to go on from.
    """
    section: DenseConfig = getattr(ctx.recipe, ctx.stage)
    for note in plan.notes:
        ctx.logger.say(note)
    run = DenseRun(
        network,
        section,
        plan,
        seed=ctx.recipe.seed,
        ranks=ranks,
        states=states_of(ctx),
        logger=ctx.logger,
        start=start,
    )
    run.train(train_set, groups or [0] * len(train_set), num_workers(ctx.recipe.data))


def predictions(ctx: StageContext, network: Any, val_set: Any, ranks: Ranks) -> Iterator[Any]:
    """mm's samples with predictions, of this rank's share of a validation set.

    One picture at a time, as the published numbers are made: padding to a batch would change what global
    attention sees.
    """
    loader = eval_loader(
        val_set,
        batch=1,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        workers=num_workers(ctx.recipe.data),
    )
    ctx.logger.say(f"Predicting {len(val_set)} validation images")
    network.eval()
    with torch.no_grad():
        for batch in loader:
            yield from network.test_step(batch)


def gathered(rows: list[T], ranks: Ranks) -> list[T]:
    """The rows of all ranks, on every rank."""
    if ranks.num_ranks == 1:
        return rows
    shares: list[list[T]] = [[] for _ in range(ranks.num_ranks)]
    dist.all_gather_object(shares, rows)
    return list(chain.from_iterable(shares))


def save_config(ctx: StageContext, **parts: Any) -> None:
    """Write what mmdet or mmseg was given as `mm_config.json` (rank 0)."""
    if ctx.is_main:
        with disk_errors(ctx.folder):
            (ctx.folder / CONFIG).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
