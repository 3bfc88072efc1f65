"""What frozen pre-trained features are worth: nearest neighbours and a linear classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitpipe.contracts.protocol import PROTOCOL
from vitpipe.data.batches import ImageSet
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.knn import KnnAccuracy, knn_accuracy
from vitpipe.evaluate.linear import LinearSettings
from vitpipe.evaluate.rate_sweep import LinearResult, linear_accuracy
from vitpipe.models.build import as_stored, build_encoder
from vitpipe.models.network import Encoder
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state
from vitpipe.stages.context import StageContext
from vitpipe.stages.probe.augmented import train_on_augmented
from vitpipe.stages.probe.config import ProbeConfig
from vitpipe.stages.probe.ledger import ledger
from vitpipe.stages.training import (
    centre_batches,
    measured_weights,
    open_sets,
    seed_model,
    trained_augment,
)

_BATCH = 64  # forward only: its size changes speed and memory, not the numbers


@dataclass(frozen=True)
class _OnFeatures:
    """Figures of one network on features that are computed once."""

    knn: KnnAccuracy
    linear: LinearResult

    def metrics(self, prefix: str, linear_name: str) -> dict[str, float]:
        """Flat metrics; `linear_name` is that of the linear classifier's."""
        found = {
            f"{prefix}knn_top1": self.knn.top1,
            f"{prefix}knn_top5": self.knn.top5,
            f"{prefix}{linear_name}_top1": self.linear.top1,
        }
        if self.linear.best_epoch_top1 is not None:
            found[f"{prefix}{linear_name}_best_epoch_top1"] = self.linear.best_epoch_top1
        return found


def run(ctx: StageContext) -> dict[str, float]:
    """Measure the features of the `weights` input, those that the paper's linear probe reads.

    Writes `linear.safetensors` where the linear classifier is trained through the frozen network, and the
    tables `protocol` and, of several learning rates, `linear_sweep`.

    Returns:
        `knn_top1`, `knn_top5`, `linear_top1` on the validation set, and `random_...`, the same of random
        weights. Where the linear classifier is trained through the network, `cached_linear_top1` is that on
        features computed once, which the baseline has, too. `linear_top1` is the last epoch's; with
        `best_epoch` that of the best one on the validation set is beside it, `linear_best_epoch_top1`.
    """
    section: ProbeConfig = ctx.section
    sets = open_sets(ctx)
    network, random = (net.to(ctx.ranks.device).eval() for net in _frozen_networks(ctx))
    found, baseline = (_on_features(ctx, net, sets) for net in (network, random))
    if found.linear.sweep:
        rows = found.linear.rows(weights="trained") + baseline.linear.rows(weights="random")
        ctx.logger.table("linear_sweep", rows)
    ctx.logger.table(PROTOCOL, ledger(ctx, network, len(sets[0]), sets[1], found.linear))
    name = "linear" if section.linear is None else "cached_linear"
    metrics = found.metrics("", name) | baseline.metrics("random_", name)
    if section.linear is not None:
        metrics |= train_on_augmented(ctx, network, section.linear, _BATCH)
    return metrics


def _on_features(ctx: StageContext, network: Encoder, sets: tuple[ImageSet, ImageSet]) -> _OnFeatures:
    """Nearest neighbours and a linear classifier on features that are computed once, for both."""
    section: ProbeConfig = ctx.section
    train, val = (_features(ctx, network, images) for images in sets)
    num_classes, last = len(sets[0].classes), network.feature_width
    knn = knn_accuracy(
        # The last block's, which come last.
        train[0][:, -last:],
        train[1],
        val[0][:, -last:],
        val[1],
        num_classes=num_classes,
        num_neighbours=section.neighbours,
        temperature=section.temperature,
        ranks=ctx.ranks,
    )
    # On every rank: each has gathered all features, and the classifiers are small.
    settings = LinearSettings(
        num_classes=num_classes,
        epochs=section.epochs,
        batch=section.batch,
        seed=ctx.recipe.seed,
        standardise=section.standardise,
        schedule_unit=section.schedule_unit,
    )
    return _OnFeatures(
        knn, linear_accuracy(train, val, section.rates, settings, measure_epochs=section.best_epoch)
    )


def _frozen_networks(ctx: StageContext) -> tuple[Encoder, Encoder]:
    """The network of the `weights` input, every key accounted for, and the same one with random weights."""
    path = measured_weights(ctx)
    info = describe(load_state(path), path)
    # Options as in the file, which may be of either stage.
    model = as_stored(ctx.recipe.model, info)
    seed_model(ctx)
    # What a figure of pre-training has to beat: random convolutions and attention are features, too.
    random = build_encoder(model)
    network = build_encoder(model)
    ctx.logger.table("weights_account", transfer_weights(network, path).table())
    return network, random


def _features(ctx: StageContext, network: Encoder, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Features (M, C * last_blocks) and labels (M,) of a whole set, centre crops, in one pass."""
    ranks, section = ctx.ranks, ctx.section
    features, labels = extract_features(
        lambda images_BCHW: network.frozen_features(images_BCHW, section.last_blocks),
        centre_batches(ctx, images, trained_augment(ctx), section.eval_crop_ratio, _BATCH),
        num_images=len(images),
        width=network.feature_width * section.last_blocks,
        ranks=ranks,
    )
    return features.to(ranks.device), labels.to(ranks.device)
