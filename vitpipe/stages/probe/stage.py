"""What frozen pre-trained features are worth: nearest neighbours and a linear classifier."""

from __future__ import annotations

from torch import Tensor

from vitpipe.contracts.protocol import PROTOCOL
from vitpipe.data.batches import ImageSet
from vitpipe.data.mixup import Mixup
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.knn import knn_predict
from vitpipe.evaluate.linear import train_linear
from vitpipe.methods.classify.method import Classify
from vitpipe.models.build import as_stored, build_encoder
from vitpipe.models.frozen import FrozenProbe
from vitpipe.models.network import Encoder
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state, save_weights
from vitpipe.stages.context import StageContext
from vitpipe.stages.probe.config import LinearConfig, ProbeConfig
from vitpipe.stages.training import (
    accuracy_protocol,
    centre_batches,
    fit,
    make_plan,
    open_sets,
    seed_model,
    trained_augment,
)

_BATCH = 64  # forward only: its size changes speed and memory, not the numbers
LINEAR_WEIGHTS = "linear.safetensors"


def run(ctx: StageContext) -> dict[str, float]:
    """Measure the features of the `weights` input, those that the paper's linear probe reads.

    Writes `linear.safetensors` where the linear classifier is trained through the frozen network.

    Returns:
        `knn_top1`, `linear_top1` on the validation set, and `random_...`, the same of random weights.
        Where the linear classifier is trained through the network, `cached_linear_top1` is that on features
        computed once, which the baseline has, too.
    """
    section: ProbeConfig = ctx.section
    sets = open_sets(ctx)
    network, random = (net.to(ctx.ranks.device).eval() for net in _frozen_networks(ctx))
    (knn, linear), (random_knn, random_linear) = (_on_features(ctx, net, sets) for net in (network, random))
    found = {"knn_top1": knn, "random_knn_top1": random_knn}
    augment = trained_augment(ctx) if section.linear is None else section.linear.augment
    trained = "on features computed once" if section.linear is None else "on augmented images"
    rows = accuracy_protocol(
        ctx, ["linear_top1"], sets[1], augment, section.eval_crop_ratio, classifier=trained
    )
    ctx.logger.table(PROTOCOL, rows)
    if section.linear is None:
        return found | {"linear_top1": linear, "random_linear_top1": random_linear}
    found |= {"cached_linear_top1": linear, "random_cached_linear_top1": random_linear}
    return found | {"linear_top1": _trained_top1(ctx, network, section.linear)}


def _on_features(ctx: StageContext, network: Encoder, sets: tuple[ImageSet, ImageSet]) -> tuple[float, float]:
    """Top-1 of nearest neighbours and of a linear classifier on features that are computed once."""
    section: ProbeConfig = ctx.section
    train_set, val_set = sets
    train_MC, train_labels_M = _features(ctx, network, train_set)
    val_NC, val_labels_N = _features(ctx, network, val_set)
    # On every rank: each has gathered all features, and the search takes seconds.
    predicted_N = knn_predict(
        train_MC,
        train_labels_M,
        val_NC,
        num_classes=len(train_set.classes),
        num_neighbours=section.neighbours,
        temperature=section.temperature,
    )
    probe = train_linear(
        train_MC,
        train_labels_M,
        num_classes=len(train_set.classes),
        epochs=section.epochs,
        batch=section.batch,
        base_lr=section.base_lr,
        seed=ctx.recipe.seed,
    )
    hits_N = probe.logits(val_NC).argmax(dim=1) == val_labels_N
    return _share(predicted_N == val_labels_N), _share(hits_N)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())  # float32 sums of 0 and 1 are exact only up to 16.7 million images


def _frozen_networks(ctx: StageContext) -> tuple[Encoder, Encoder]:
    """The network of the `weights` input, every key accounted for, and the same one with random weights."""
    path = ctx.inputs["weights"].weights
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
    """Features (M, C) and labels (M,) of a whole set, centre crops."""
    ranks, crop_ratio = ctx.ranks, ctx.section.eval_crop_ratio
    features, labels = extract_features(
        network.frozen_features,
        centre_batches(ctx, images, trained_augment(ctx), crop_ratio, _BATCH),
        num_images=len(images),
        width=network.feature_width,
        ranks=ranks,
    )
    return features.to(ranks.device), labels.to(ranks.device)


def _trained_top1(ctx: StageContext, network: Encoder, linear: LinearConfig) -> float:
    """Train a linear layer on augmented images through the frozen network; its accuracy."""
    train_set, val_set = open_sets(ctx)
    num_classes = len(train_set.classes)
    seed_model(ctx)
    probe = FrozenProbe(network, num_classes)
    # Linear probes of the papers train with plain cross entropy; mixing follows the recipe's augment.
    mix = Mixup(linear.augment, num_classes, label_smoothing=0.0)
    # Saved states leave the frozen network out: it is loaded from the `weights` input anyway.
    method = Classify(probe, mix, train_set.classes, frozen=("model.network",))
    plan = make_plan(ctx, linear, train_set)
    fit(ctx, method, plan, train_set, linear)
    if ctx.is_main:
        save_weights(probe.head(), ctx.folder / LINEAR_WEIGHTS)
    ranks, crop_ratio = ctx.ranks, ctx.section.eval_crop_ratio
    accuracy = evaluate_classifier(
        probe,
        centre_batches(ctx, val_set, linear.augment, crop_ratio, _BATCH),
        num_classes,
        ranks=ranks,
        precision=plan.precision,
    )
    ctx.logger.table("linear_per_class", accuracy.class_rows(val_set.classes))
    return accuracy.top1
