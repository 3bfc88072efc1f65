"""What the training stages share: from a recipe's section to a trained network in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import AugmentConfig, ClassifyConfig, OptimConfig, TrainConfig
from vitpipe.config.resolve import TRAIN_SET, TrainPlan, num_workers, train_plan
from vitpipe.contracts.artifact import WEIGHTS
from vitpipe.contracts.graph import BY_NAME
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.augment import eval_transform, train_transform
from vitpipe.data.batches import Batch, eval_batches, train_batches
from vitpipe.data.mixup import Mixup
from vitpipe.data.shards import ShardSet, open_shards
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.methods.classify import Classify
from vitpipe.methods.method import Method
from vitpipe.models.build import build_classifier
from vitpipe.models.network import Classifier, Network
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import save_weights
from vitpipe.optim.groups import parameter_groups
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.stages.context import StageContext
from vitpipe.stages.used_datasets import record_datasets
from vitpipe.stages.weights_identity import starting_weights, weights_identity
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.ranks import Ranks, joined
from vitpipe.train.state import TrainState

EMA_WEIGHTS = "ema.safetensors"


def train_classifier(ctx: StageContext) -> dict[str, float]:
    """The work of `intermediate` and `finetune`: train a classifier, measure it on the validation set.

    Writes `weights.safetensors`, `ema.safetensors` where the recipe averages weights, and the tables
    `plan`, `weights_account`, `per_class`.

    Returns:
        `top1`, `top5`, `loss`, and the same with `ema_` for averaged weights.
    """
    section: ClassifyConfig = getattr(ctx.recipe, ctx.stage)
    with joined(ctx.rank, ctx.num_ranks, ctx.device) as ranks:
        train_set, val_set = open_sets(ctx, TRAIN_SET[ctx.stage])
        num_classes = len(train_set.classes)
        seed_model(ctx)
        model = build_classifier(
            ctx.recipe.model,
            num_classes=num_classes,
            drop_path=section.drop_path,
            relative_position=section.relative_position,
            head_init_std=section.head_init_std,
        )
        start = start_from_weights(ctx, model)
        method = Classify(model, Mixup(section.augment, num_classes, section.label_smoothing))
        plan = make_plan(ctx, section, train_set, ranks)
        groups = network_groups(model, section.optim)
        state = fit(ctx, method, groups, plan, train_set, ranks, start=start)

        metrics = measure_and_save(ctx, model, val_set, plan, ranks)
        if state.average:
            # Only now: the average takes the place of the weights that have just been saved.
            model.load_state_dict(state.average.shadow)
            metrics |= measure_and_save(ctx, model, val_set, plan, ranks, "ema_", EMA_WEIGHTS)
    return metrics


def measure_and_save(
    ctx: StageContext,
    model: Classifier,
    val_set: ShardSet,
    plan: TrainPlan,
    ranks: Ranks,
    prefix: str = "",
    file_name: str = WEIGHTS,
) -> dict[str, float]:
    """Evaluate a trained classifier and write it; `prefix` goes before the names of metrics and table."""
    section: ClassifyConfig = getattr(ctx.recipe, ctx.stage)
    accuracy = evaluate_classifier(
        model,
        centre_batches(ctx, val_set, section.augment, section.eval_crop_ratio, section.eval_batch, ranks),
        model.num_classes,
        ranks=ranks,
        precision=plan.precision,
    )
    ctx.logger.table(f"{prefix}per_class", accuracy.class_rows(val_set.classes))
    save_result(ctx, model, file_name, classes=json.dumps(val_set.classes))
    return {prefix + name: value for name, value in accuracy.metrics().items()}


def open_sets(
    ctx: StageContext, dataset: str, used: Sequence[str] = ("train", "val")
) -> tuple[ShardSet, ShardSet]:
    """Training and validation set from the `data` input; the tracker is told which of them are used."""
    folder = ctx.inputs["data"].path
    train_set, val_set = (open_shards(folder, dataset, split) for split in ("train", "val"))
    record_datasets(ctx, dataset, used)
    return train_set, val_set


def seed_model(ctx: StageContext) -> None:
    """Fix the start values of the network that is built next: the same on every rank and at every resume."""
    torch.manual_seed(seed_of("model", ctx.recipe.seed, ctx.stage))


def trained_augment(ctx: StageContext) -> AugmentConfig:
    """Interpolation and normalisation that the `weights` input was trained with."""
    section: TrainConfig = getattr(ctx.recipe, ctx.inputs["weights"].card.stage)
    return section.augment


def start_from_weights(ctx: StageContext, model: Network) -> str:
    """Load the starting weights, if there are any, and record what became of every key.

    Returns:
        A line that says so, for a run that really starts and does not go on from a saved state.

    Raises:
        CheckpointError: when they cannot be read or do not fit.
    """
    path = starting_weights(ctx.stage, ctx.recipe, ctx.inputs)
    if path is None:
        return "Starting from random weights"
    report = transfer_weights(model, path)
    ctx.logger.table("weights_account", report.table())
    return f"Weights from {path}: {report.summary()}"


def make_plan(ctx: StageContext, section: TrainConfig, train_set: ShardSet, ranks: Ranks) -> TrainPlan:
    """Derive and record steps, learning rate, accumulation and precision."""
    plan = train_plan(
        section,
        path=ctx.stage,
        num_images=len(train_set),
        num_ranks=ranks.num_ranks,
        accelerator=ranks.accelerator,
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
    ranks: Ranks,
    section: TrainConfig | None = None,
    start: str = "",
) -> TrainState:
    """Hand method, data and optimiser to the loop; states are kept in `ctx.state`.

    Args:
        section: what the loop reads; the stage's own if not given.
        start: what the weights are, said when there is no state to go on from.
    """
    section = section or getattr(ctx.recipe, ctx.stage)
    transform = train_transform(section.augment, ctx.recipe.model.image_size)
    method.to(ranks.device)

    def batches(start_step: int) -> Iterator[Batch]:
        return train_batches(
            train_set,
            transform,
            seed=ctx.recipe.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
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
        ranks=ranks,
        states=states_of(ctx),
        logger=ctx.logger,
        start=start,
    )


def states_of(ctx: StageContext) -> StateFolder:
    """The saved states of this stage's run: those that the same recipe values, data and weights have made."""
    identity = digest_of(weights_identity(BY_NAME[ctx.stage], ctx.recipe, ctx.inputs))
    return StateFolder(ctx.state, identity, ctx.logger.say)


def centre_batches(
    ctx: StageContext, shards: ShardSet, augment: AugmentConfig, crop_ratio: float, batch: int, ranks: Ranks
) -> Iterator[Batch]:
    """This rank's share of a set, centre crops; `augment` gives interpolation and normalisation."""
    return eval_batches(
        shards,
        eval_transform(ctx.recipe.model.image_size, crop_ratio, augment),
        batch=batch,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
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
