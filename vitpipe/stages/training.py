"""Steps that the training stages share: open the sets, load weights, plan, train, save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import AugmentConfig, OptimConfig, TrainConfig
from vitpipe.config.resolve import TrainPlan, num_workers, train_plan
from vitpipe.contracts.artifact import WEIGHTS
from vitpipe.contracts.graph import BY_NAME
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.augment import eval_transform, train_transform
from vitpipe.data.batches import Batch, eval_batches, train_batches
from vitpipe.data.shards import ShardSet, open_shards
from vitpipe.methods.method import Method
from vitpipe.models.network import Network
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import save_weights
from vitpipe.optim.groups import parameter_groups
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.stages.context import StageContext
from vitpipe.stages.used_datasets import record_datasets
from vitpipe.stages.weights_identity import starting_weights, weights_identity
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.state import TrainState


def open_sets(
    ctx: StageContext, dataset: str, used: Sequence[str] = ("train", "val")
) -> tuple[ShardSet, ShardSet]:
    """Training and validation set from the `data` input; the tracker is told which of them are used."""
    folder = ctx.inputs["data"].path
    train_set, val_set = (open_shards(folder, dataset, split) for split in ("train", "val"))
    record_datasets(ctx, dataset, used)
    return train_set, val_set


def seed_model(ctx: StageContext) -> None:
    """Seed the initial values of the network that is built next.

    The same on every rank and at every resume, whatever has been drawn before.
    """
    # The stage's name: fine-tuning does not start its head from the values that pre-training drew.
    torch.manual_seed(seed_of("model", ctx.recipe.seed, ctx.stage))


def trained_augment(ctx: StageContext) -> AugmentConfig:
    """Interpolation and normalisation that the `weights` input was trained with."""
    section: TrainConfig = getattr(ctx.recipe, ctx.inputs["weights"].card.stage)
    return section.augment


def start_from_weights(ctx: StageContext, model: Network) -> str:
    """Load the starting weights, if there are any, and record how every key was matched.

    Returns:
        A message for the terminal. The loop prints it only when no saved state is resumed.

    Raises:
        CheckpointError: when they cannot be read or do not fit.
    """
    path = starting_weights(ctx.stage, ctx.recipe, ctx.inputs)
    if path is None:
        return "Starting from random weights"
    report = transfer_weights(model, path)
    # Always as a table, matched keys included: a silently dropped key is the commonest cause of a bad result.
    ctx.logger.table("weights_account", report.table())
    return f"Weights from {path}: {report.summary()}"


def make_plan(ctx: StageContext, section: TrainConfig, train_set: ShardSet) -> TrainPlan:
    """Derive and record steps, learning rate, accumulation and precision."""
    plan = train_plan(
        section,
        path=ctx.stage,
        num_images=len(train_set),
        num_ranks=ctx.ranks.num_ranks,
        accelerator=ctx.ranks.accelerator,
    )
    ctx.logger.table("plan", [asdict(reason) for reason in plan.reasons])
    return plan


def network_groups(model: Network, optim: OptimConfig) -> list[dict[str, Any]]:
    """Optimiser groups, with layer-wise learning rates where the recipe decays them."""
    return parameter_groups(
        model.named_parameters(),
        weight_decay=optim.weight_decay,
        no_decay=model.no_decay,
        layer_of=model.layer_of if optim.layer_decay else None,
        layer_scales=model.layer_scales(optim.layer_decay) if optim.layer_decay else (),
    )


def fit(
    ctx: StageContext,
    method: Method,
    groups: list[dict[str, Any]],
    plan: TrainPlan,
    train_set: ShardSet,
    section: TrainConfig | None = None,
    start: str = "",
) -> TrainState:
    """Train by the loop of `vitpipe.train`; states are kept in `ctx.state`.

    Args:
        section: what the loop reads; the stage's own if not given.
        start: origin of the weights; printed when no saved state is resumed.
    """
    section = section or ctx.section
    transform = train_transform(section.augment, ctx.recipe.model.image_size)
    # Before the optimiser is built: its state is created on the device of the parameters.
    method.to(ctx.ranks.device)

    # A function of the step: a resumed run starts at any batch without reading those before it.
    def batches(start_step: int) -> Iterator[Batch]:
        return train_batches(
            train_set,
            transform,
            seed=ctx.recipe.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=ctx.ranks.rank,
            num_ranks=ctx.ranks.num_ranks,
            start_step=start_step,
            num_steps=plan.num_steps,
            workers=num_workers(ctx.recipe.data),
        )

    return train(
        method,
        batches,
        plan,
        optimiser=build_optimiser(groups, section.optim),
        section=section,
        seed=ctx.recipe.seed,
        ranks=ctx.ranks,
        states=states_of(ctx),
        logger=ctx.logger,
        start=start,
    )


def states_of(ctx: StageContext) -> StateFolder:
    """The saved states of this stage: those of the same recipe values, data and starting weights."""
    # In every state's name and content: a folder may hold states of several identities.
    identity = digest_of(weights_identity(BY_NAME[ctx.stage], ctx.recipe, ctx.inputs))
    return StateFolder(ctx.state, identity, ctx.logger.say)


def centre_batches(
    ctx: StageContext,
    shards: ShardSet,
    augment: AugmentConfig,
    crop_ratio: float,
    batch: int,
    *,
    is_shared: bool = True,
) -> Iterator[Batch]:
    """Centre crops of a set in its own order.

    Args:
        augment: gives interpolation and normalisation.
        is_shared: only this rank's share; else all images on every rank that asks.
    """
    rank, num_ranks = (ctx.ranks.rank, ctx.ranks.num_ranks) if is_shared else (0, 1)
    return eval_batches(
        shards,
        eval_transform(ctx.recipe.model.image_size, crop_ratio, augment),
        batch=batch,
        rank=rank,
        num_ranks=num_ranks,
        workers=num_workers(ctx.recipe.data),
    )


def save_result(ctx: StageContext, model: nn.Module, file_name: str = WEIGHTS, **metadata: str) -> None:
    """Write the trained weights into the stage's folder (rank 0).

    Raises:
        StorageError: when the disk refuses.
    """
    if ctx.is_main:
        about = {"stage": ctx.stage, "recipe": ctx.recipe.name, "profile": ctx.recipe.profile}
        save_weights(model, ctx.folder / file_name, {**about, **metadata})
