"""What frozen pre-trained features are worth: nearest neighbours and a linear classifier."""

from __future__ import annotations

from torch import Tensor

from vitpipe.config.recipe import LinearConfig, ProbeConfig
from vitpipe.config.resolve import TRAIN_SET
from vitpipe.data.mixup import Mixup
from vitpipe.data.shards import ShardSet
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.knn import knn_predict
from vitpipe.evaluate.linear import train_linear
from vitpipe.methods.classify import Classify
from vitpipe.models.build import build_classifier
from vitpipe.models.frozen import FrozenProbe
from vitpipe.models.network import Classifier
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state, save_weights
from vitpipe.optim.groups import parameter_groups
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import centre_batches, fit, make_plan, open_sets, seed_model, trained_augment

_BATCH = 64  # forward only: its size changes speed and memory, not the numbers
LINEAR_WEIGHTS = "linear.safetensors"


def run(ctx: StageContext) -> dict[str, float]:
    """Measure the features of the `weights` input, those that the paper's linear probe reads.

    Writes `linear.safetensors` where the linear classifier is trained through the frozen network.

    Returns:
        `knn_top1`, `linear_top1` on the validation set.
    """
    section: ProbeConfig = ctx.section
    train_set, val_set = open_sets(ctx, TRAIN_SET["finetune"])
    network = _frozen_network(ctx).to(ctx.ranks.device).eval()
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
    knn = _share(predicted_N == val_labels_N)
    if section.linear is not None:
        return {"knn_top1": knn, "linear_top1": _trained_top1(ctx, network, section.linear)}
    probe = train_linear(
        train_MC,
        train_labels_M,
        num_classes=len(train_set.classes),
        epochs=section.epochs,
        batch=section.batch,
        base_lr=section.base_lr,
        seed=ctx.recipe.seed,
    )
    return {"knn_top1": knn, "linear_top1": _share(probe.logits(val_NC).argmax(dim=1) == val_labels_N)}


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())  # float32 sums of 0 and 1 are exact only up to 16.7 million images


def _frozen_network(ctx: StageContext) -> Classifier:
    """The network of the `weights` input, every key accounted for."""
    path = ctx.inputs["weights"].weights
    info = describe(load_state(path), path)
    # One class: the head is not used. Position bias as in the file, which may be of either stage.
    network = build_classifier(ctx.recipe.model, num_classes=1, relative_position=info.relative_position)
    ctx.logger.table("weights_account", transfer_weights(network, path).table())
    return network


def _features(ctx: StageContext, network: Classifier, images: ShardSet) -> tuple[Tensor, Tensor]:
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


def _trained_top1(ctx: StageContext, network: Classifier, linear: LinearConfig) -> float:
    """Train a linear layer on augmented images through the frozen network; its accuracy."""
    train_set, val_set = open_sets(ctx, TRAIN_SET["finetune"])
    num_classes = len(train_set.classes)
    seed_model(ctx)
    probe = FrozenProbe(network, num_classes)
    # Linear probes of the papers train with plain cross entropy; mixing follows the recipe's augment.
    method = Classify(probe, Mixup(linear.augment, num_classes, label_smoothing=0.0))
    plan = make_plan(ctx, linear, train_set)
    # The frozen network's parameters need no gradient and form no group.
    groups = parameter_groups(probe.named_parameters(), weight_decay=linear.optim.weight_decay)
    fit(ctx, method, groups, plan, train_set, linear)
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
