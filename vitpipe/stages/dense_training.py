"""Steps that detect and segment share: plan, train, predict, measure, write the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import nn

from vitpipe.config.dense_sections import DenseConfig
from vitpipe.config.resolve import Reason, TrainPlan, num_workers
from vitpipe.contracts.errors import RecipeError, disk_errors
from vitpipe.contracts.protocol import protocol_rows
from vitpipe.dense.feed import DenseBatch, eval_loader, train_batches
from vitpipe.dense.method import DenseMethod
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import EMA_WEIGHTS, make_plan, run_loop, save_result
from vitpipe.train.state import TrainState

CONFIG = "mm_config.json"


def plan_dense(
    ctx: StageContext, train_set: Sized, *, needs_two_images: bool = False
) -> tuple[TrainPlan, str]:
    """The plan, and the type of batch norm in the heads: `SyncBN` or `BN`.

    Args:
        train_set: for detection without the images that have no object.
        needs_two_images: the head has batch norm over a single value per channel and image.

    Raises:
        RecipeError: as `train_plan`, or a rank's share is too small for the head.
    """
    num_ranks, section = ctx.ranks.num_ranks, ctx.section
    # torch's SyncBatchNorm has no CPU kernel; on a single rank it equals plain batch norm.
    synchronised = num_ranks > 1 and ctx.ranks.accelerator.kind == "cuda"

    def norm(plan: TrainPlan) -> Reason:
        images = plan.micro_batch * (num_ranks if synchronised else 1)
        over = "all ranks" if synchronised else "one rank"
        return Reason(
            f"{ctx.stage}.norm", "SyncBN" if synchronised else "BN", f"over {over}: {images} images"
        )

    plan = make_plan(ctx, section, train_set, norm)
    # With one value per channel torch's batch norm raises "Expected more than 1 value per channel when
    # training".
    if needs_two_images and plan.micro_batch == 1 and not synchronised:
        raise RecipeError(
            f"Batch norm in the head '{section.head.name}' needs at least two images on each rank",
            where=f"{ctx.stage}.global_batch",
            fix=f"use an even number of images per rank: a global batch that {2 * num_ranks} divides",
        )
    return plan, "SyncBN" if synchronised else "BN"


def fit_dense(
    ctx: StageContext,
    network: nn.Module,
    plan: TrainPlan,
    train_set: Any,
    groups: list[int] | None = None,
    *,
    norm: str,
    start: str = "",
) -> TrainState:
    """Train by the loop of `vitpipe.train`; states are kept in `ctx.state`.

    Args:
        network: a detector or segmentor on its device, with the weights from which training starts.
        groups: group number of each sample; samples of different groups should not be padded together. One
            group by default.
        norm: as `plan_dense` gives it.
        start: origin of the weights, printed when there is no saved state to resume from.
    """
    section: DenseConfig = ctx.section
    method = DenseMethod(network, synchronised=norm == "SyncBN")

    def batches(start_step: int) -> Iterator[DenseBatch]:
        return train_batches(
            train_set,
            plan,
            groups or [0] * len(train_set),
            seed=ctx.recipe.seed,
            rank=ctx.ranks.rank,
            start_step=start_step,
            workers=num_workers(ctx.recipe.data),
        )

    return run_loop(ctx, method, batches, plan, section, start=start)


def measure_dense(
    ctx: StageContext, state: TrainState, measured: Callable[[str], dict[str, float]], **metadata: str
) -> dict[str, float]:
    """Save and measure the trained network and, where the recipe averages weights, the average.

    Args:
        measured: prefix of metrics, tables and figures -> metrics.
        metadata: saved with the weights.
    """
    network = state.method.model
    save_result(ctx, network, **metadata)
    metrics = measured("")
    if state.average:
        network.load_state_dict(state.average.shadow)
        ctx.logger.say("Now with averaged weights")
        save_result(ctx, network, EMA_WEIGHTS, **metadata)
        metrics |= measured("ema_")
    return metrics


def counted_params(network: nn.Module, prefix: str) -> tuple[dict[str, float], list[dict[str, str]]]:
    """`params` of the whole network, once: not for other weights of the same one; and its protocol."""
    if prefix:
        return {}, []
    metrics = {"params": float(sum(p.numel() for p in network.parameters()))}
    return metrics, protocol_rows(metrics, {"counted": "network with all heads"})


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


def save_config(ctx: StageContext, **parts: Any) -> None:
    """Write the configuration that mmdet or mmseg gets as `mm_config.json` (rank 0).

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    if ctx.is_main:
        with disk_errors(ctx.folder):
            (ctx.folder / CONFIG).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
