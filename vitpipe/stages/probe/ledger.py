"""The rows of the table `protocol`: which features were read, and how they were classified."""

from __future__ import annotations

from functools import partial

from vitpipe.data.batches import ImageSet
from vitpipe.evaluate.rate_sweep import HELD_OUT, LinearResult
from vitpipe.models.network import Encoder
from vitpipe.stages.context import StageContext
from vitpipe.stages.probe.config import LinearConfig, ProbeConfig
from vitpipe.stages.training import accuracy_protocol, trained_augment


def ledger(
    ctx: StageContext, network: Encoder, num_train: int, val_set: ImageSet, cached: LinearResult
) -> list[dict[str, str]]:
    """Rows for every figure of the trained features; the random ones are measured in the same way.

    Args:
        num_train: labelled images, which are the neighbours.
        cached: the linear classifier on features computed once.
    """
    section: ProbeConfig = ctx.section
    measured = partial(accuracy_protocol, ctx, val_set=val_set, crop_ratio=section.eval_crop_ratio)
    rows = measured(
        ("knn_top1", "knn_top5"),
        augment=trained_augment(ctx),
        features=network.frozen_reading(),
        classifier="weighted nearest neighbours",
        neighbours=min(section.neighbours, num_train),
        temperature=section.temperature,
    )
    figures = {"": "last"}
    if section.best_epoch:
        figures["best_epoch_"] = "best on the validation images"
    for which, epoch in figures.items():
        linear = partial(
            measured,
            features=network.frozen_reading(section.last_blocks),
            standardised="yes" if section.standardise else "no",
            epoch=epoch,
        )
        name = "linear" if section.linear is None else "cached_linear"
        rows += linear(
            [f"{name}_{which}top1"],
            augment=trained_augment(ctx),
            classifier="on features computed once",
            **{"learning rate": _cached_rate(cached)},
        )
        if section.linear is not None:
            rows += linear(
                [f"linear_{which}top1"],
                augment=section.linear.augment,
                classifier="on augmented images",
                **{"learning rate": _trained_rate(section.linear)},
            )
    return rows


def _cached_rate(cached: LinearResult) -> str:
    rate = f"{cached.base_lr:g} per 256 images"
    if not cached.sweep:
        return rate
    rates = ", ".join(f"{result.base_lr:g}" for result in cached.sweep)
    return f"{rate}, chosen from {rates} by {HELD_OUT:.0%} of the training images"


def _trained_rate(linear: LinearConfig) -> str:
    optim = linear.optim
    images = "" if optim.lr_reference_batch is None else f" per {optim.lr_reference_batch} images"
    return f"{optim.base_lr:g}{images}, {optim.name.upper()}"
