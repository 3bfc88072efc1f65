"""Steps that the training stages share: open the sets, load weights, plan, train, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitpipe.config.digest import digest_of
from vitpipe.config.resolve import Reason, TrainPlan, num_workers, train_plan
from vitpipe.config.train_sections import AugmentConfig, LoopConfig, TrainConfig
from vitpipe.contracts.artifact import WEIGHTS
from vitpipe.contracts.errors import CheckpointError
from vitpipe.contracts.graph import PICTURES, all_stages
from vitpipe.contracts.protocol import WARNINGS, centre_crop, protocol_rows
from vitpipe.contracts.seeds import seed_of
from vitpipe.contracts.units import counted
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import Batch, ImageSet, eval_batches, train_batches
from vitpipe.data.image_grid import optional_figure
from vitpipe.data.low_shot import LabelledSet, LowShot
from vitpipe.data.manifest import DenseManifest
from vitpipe.data.shards import open_shards
from vitpipe.datasets.dense_pictures import open_pictures
from vitpipe.evaluate.reconstruct import save_columns
from vitpipe.methods.method import Method, method_class
from vitpipe.models.build import stored_classifier
from vitpipe.models.families import family_of
from vitpipe.models.network import Classifier, Network
from vitpipe.models.transfer import load_same, transfer_weights
from vitpipe.models.weights import save_weights
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.prepare.set_summary import read_set
from vitpipe.stages.context import StageContext
from vitpipe.stages.used_datasets import record_datasets
from vitpipe.stages.weights_identity import dataset_read, starting_weights, weights_identity
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.state import TrainState
from vitpipe.train.trainable import MicroBatch, Trainable
from vitpipe.train.validation import Validation

EMA_WEIGHTS = "ema.safetensors"


def open_sets(ctx: StageContext, used: Sequence[str] = ("train", "val")) -> tuple[ImageSet, ImageSet]:
    """Training and validation set of the stage's dataset; the tracker is told which of them are used.

    The training set has the share of its images that the section asks for. A stage that learns without labels
    gets the pictures of a set with annotations, with no classes and label 0.

    Raises:
        DatasetError: when it was not prepared, or is of another kind.
    """
    folder = ctx.inputs["data"].path
    # Weights from outside, of an earlier version: ImageNet was all that probe and evaluate could read.
    dataset = dataset_read(ctx.stage, ctx.recipe, ctx.inputs) or "imagenet"
    sets: dict[str, LabelledSet]
    if _reads_pictures(ctx) and isinstance(read_set(folder, dataset), DenseManifest):
        sets = {**open_pictures(folder, dataset, ctx.state / "data", ctx.logger.say)}
    else:
        sets = {split: open_shards(folder, dataset, split) for split in ("train", "val")}
    whole, val_set = sets["train"], sets["val"]
    record_datasets(ctx, dataset, used)
    section = ctx.section
    chosen = section.num_images(len(whole)) if isinstance(section, LoopConfig) else len(whole)
    return (whole if chosen == len(whole) else LowShot(whole, chosen, ctx.recipe.seed)), val_set


def _reads_pictures(ctx: StageContext) -> bool:
    """Whether the stage can do without classes."""
    method = getattr(ctx.section, "method", None)
    return all_stages()[ctx.stage].reads == PICTURES and not (method and method.needs_classes)


def seed_model(ctx: StageContext) -> None:
    """Seed the initial values of the network that is built next.

    The same on every rank and at every resume, whatever has been drawn before.
    """
    # The stage's name: fine-tuning does not start its head from the values that pre-training drew.
    torch.manual_seed(seed_of("model", ctx.recipe.seed, ctx.stage))


def trained_augment(ctx: StageContext) -> AugmentConfig:
    """Interpolation and normalisation that the measured weights were trained with.

    Those of a checkpoint are not known: bicubic, and ImageNet's channel statistics, as all papers here.
    """
    if getattr(ctx.section, "weights", None) is not None:
        return AugmentConfig()
    section: TrainConfig = getattr(ctx.recipe, ctx.inputs["weights"].card.stage)
    return section.augment


def measured_classifier(ctx: StageContext, val_set: ImageSet) -> tuple[Classifier, Callable[[], Classifier]]:
    """The classifier of the `weights` input on this rank's device, and what builds it anew.

    Raises:
        CheckpointError: when the weights are not those of a classifier of this recipe's model, or of other
            classes than the set's.
    """
    path = ctx.inputs["weights"].weights
    build, state = stored_classifier(ctx.recipe.model, path)
    model = build()
    load_same(model, state, path)
    dataset = dataset_read(ctx.stage, ctx.recipe, ctx.inputs) or "imagenet"
    check_classes(model, val_set.classes, dataset, path)
    return model.to(ctx.ranks.device), build


def check_classes(model: Classifier, classes: Sequence[str], dataset: str, weights: Path) -> None:
    """Check that a classifier has as many classes as a set.

    Raises:
        CheckpointError: when it has not.
    """
    if model.num_classes != len(classes):
        raise CheckpointError(
            f"The classifier tells {counted(model.num_classes, 'class', 'classes')} apart, the set "
            f"'{dataset}' has {len(classes)}",
            where=weights,
            fix="give the data that the weights were trained on, or fine-tune on this one",
        )


def measured_weights(ctx: StageContext) -> Path:
    """The weights that a stage measures: the user's file, else those of the stage before.

    Raises:
        CheckpointError, ArtifactError: when they are missing or damaged.
    """
    path = starting_weights(ctx.stage, ctx.recipe, ctx.inputs)
    assert path is not None  # recipes without any are refused
    return path


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


def make_plan(
    ctx: StageContext, section: LoopConfig, train_set: Sized, *more: Callable[[TrainPlan], Reason]
) -> TrainPlan:
    """Derive steps, learning rate, accumulation and precision, and record them as the table `plan`.

    Args:
        more: what the stage itself derives from the plan.

    Raises:
        RecipeError: as `train_plan`.
    """
    plan = train_plan(
        section,
        path=ctx.stage,
        num_images=len(train_set),
        num_ranks=ctx.ranks.num_ranks,
        accelerator=ctx.ranks.accelerator,
    )
    reasons = (*plan.reasons, *(derive(plan) for derive in more))
    ctx.logger.table("plan", [asdict(reason) for reason in reasons])
    return plan


def build_method(ctx: StageContext, section: Any, classes: Sequence[str]) -> Method:
    """The method that a stage's section names, with seeded random weights.

    Args:
        section: with `method`.
        classes: names of the classes of the training set; none for one without labels.
    """
    seed_model(ctx)
    kind, model = method_class(section.method.name), ctx.recipe.model
    return kind.build(section.method, family_of(model), model, section=section, classes=classes)


def fit(
    ctx: StageContext,
    method: Method,
    plan: TrainPlan,
    train_set: ImageSet,
    section: TrainConfig | None = None,
    start: str = "",
    validation: Validation | None = None,
) -> TrainState:
    """Train by the loop of `vitpipe.train`; states are kept in `ctx.state`.

    Args:
        section: what the loop reads; the stage's own if not given.
        start: origin of the weights; printed when no saved state is resumed.
        validation: measured during training.
    """
    section = section or ctx.section
    transform = method.views(section.augment, ctx.recipe.model.image_size)

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

    return run_loop(ctx, method, batches, plan, section, start=start, validation=validation)


def run_loop(
    ctx: StageContext,
    method: Trainable,
    batches: Callable[[int], Iterator[MicroBatch]],
    plan: TrainPlan,
    section: LoopConfig,
    start: str = "",
    validation: Validation | None = None,
) -> TrainState:
    """Train a method of any kind, with its states in `ctx.state`; see `train.loop.train`."""
    # Before the optimiser is built: its state is created on the device of the parameters.
    method.to(ctx.ranks.device)
    state = train(
        method,
        batches,
        plan,
        optimiser=build_optimiser(method.groups(section.optim), section.optim),
        section=section,
        ranks=ctx.ranks,
        states=states_of(ctx),
        logger=ctx.logger,
        start=start,
        validation=validation,
    )
    # Running statistics of batch norms differ between ranks: all evaluate with those that are saved.
    ctx.ranks.share_from_main(method.buffers())
    return state


def states_of(ctx: StageContext) -> StateFolder:
    """The saved states of this stage: those of the same recipe values, data and starting weights."""
    # In every state's name and content: a folder may hold states of several identities.
    identity = digest_of(weights_identity(all_stages()[ctx.stage], ctx.recipe, ctx.inputs))
    return StateFolder(ctx.state, identity, ctx.logger.say)


def centre_batches(
    ctx: StageContext,
    shards: ImageSet,
    augment: AugmentConfig,
    crop_ratio: float,
    batch: int,
) -> Iterator[Batch]:
    """Centre crops of this rank's share of a set, in the set's order.

    Args:
        augment: gives interpolation and normalisation.
    """
    return eval_batches(
        shards,
        eval_transform(ctx.recipe.model.image_size, crop_ratio, augment),
        batch=batch,
        rank=ctx.ranks.rank,
        num_ranks=ctx.ranks.num_ranks,
        workers=num_workers(ctx.recipe.data),
        seed=ctx.recipe.seed,
    )


def accuracy_protocol(
    ctx: StageContext,
    metrics: Iterable[str],
    val_set: ImageSet,
    augment: AugmentConfig,
    crop_ratio: float,
    **settings: object,
) -> list[dict[str, str]]:
    """Rows of the table `protocol`: crop, interpolation, images and classes of these accuracies.

    Args:
        augment: gave the interpolation.
        settings: further ones by name.
    """
    crop = centre_crop(ctx.recipe.model.image_size, crop_ratio, augment.interpolation)
    counted = {"images": len(val_set), "classes": len(val_set.classes)}
    return protocol_rows(metrics, {**crop, **counted, **settings})


def judge(
    ctx: StageContext,
    method: Method,
    plan: TrainPlan,
    sets: tuple[ImageSet, ImageSet],
    *,
    crop_ratio: float,
    batch: int,
    prefix: str = "",
) -> dict[str, float]:
    """Let the method measure what it has learnt; record its tables and figures.

    Args:
        sets: training and validation set.
        crop_ratio: of the centre crops.
        batch: images per batch of the evaluation.
        prefix: before the names of metrics, tables and figures.
    """
    augment, (train_set, val_set) = ctx.section.augment, sets

    def batches(split: str) -> Iterator[Batch]:
        return centre_batches(ctx, train_set if split == "train" else val_set, augment, crop_ratio, batch)

    found = method.judge(batches, ctx.ranks, plan.precision)
    for name, rows in found.tables.items():
        ctx.logger.table(prefix + name, rows)
    for sentence in found.warnings:
        ctx.logger.say(sentence)
    if found.warnings:
        ctx.logger.table(f"{prefix}{WARNINGS}", [{"warning": sentence} for sentence in found.warnings])
    for name, shown in found.figures.items() if ctx.is_main else ():
        path = ctx.folder / f"{prefix}{name}.png"
        with optional_figure(prefix + name, ctx.logger.say):
            save_columns(shown.columns, augment.mean, augment.std, path, note=shown.note)
            ctx.logger.figure(prefix + name, path)
    return {prefix + name: value for name, value in found.metrics.items()}


def save_results(ctx: StageContext, method: Method, **metadata: str) -> None:
    """Write the method's results, one file each (rank 0).

    Raises:
        StorageError: when the disk refuses.
    """
    for name, module in method.results().items():
        save_result(ctx, module, f"{name}.safetensors", **metadata)


def save_result(ctx: StageContext, model: nn.Module, file_name: str = WEIGHTS, **metadata: str) -> None:
    """Write the trained weights into the stage's folder (rank 0).

    Raises:
        StorageError: when the disk refuses.
    """
    if ctx.is_main:
        about = {"stage": ctx.stage, "recipe": ctx.recipe.name, "profile": ctx.recipe.profile}
        save_weights(model, ctx.folder / file_name, {**about, **metadata})
