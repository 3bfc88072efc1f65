"""What frozen pre-trained features are worth: nearest neighbours and a linear classifier."""

from __future__ import annotations

from torch import Tensor

from vitpipe.config.resolve import TRAIN_SET
from vitpipe.data.shards import ShardSet
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.knn import knn_predict
from vitpipe.evaluate.linear import train_linear
from vitpipe.models.build import build_classifier
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import centre_batches, open_sets, trained_augment
from vitpipe.train.ranks import Ranks, joined

_BATCH = 64


def run(ctx: StageContext) -> dict[str, float]:
    """Measure the features of the `weights` input: those that the paper's probe reads.

    Returns:
        `knn_top1`, `linear_top1` on the validation set.
    """
    section = ctx.recipe.probe
    assert section is not None
    with joined(ctx.rank, ctx.num_ranks, ctx.device) as ranks:
        train_set, val_set = open_sets(ctx, TRAIN_SET["finetune"])
        num_classes = len(train_set.classes)
        features = _Features(ctx, ranks)
        train_MC, train_labels_M = features.of(train_set)
        val_NC, val_labels_N = features.of(val_set)
    predicted_N = knn_predict(
        train_MC,
        train_labels_M,
        val_NC,
        num_classes=num_classes,
        num_neighbours=section.neighbours,
        temperature=section.temperature,
    )
    probe = train_linear(
        train_MC,
        train_labels_M,
        num_classes=num_classes,
        epochs=section.epochs,
        batch=section.batch,
        base_lr=section.base_lr,
        seed=ctx.recipe.seed,
    )
    linear_N = probe.logits(val_NC).argmax(dim=1)
    return {"knn_top1": _share(predicted_N == val_labels_N), "linear_top1": _share(linear_N == val_labels_N)}


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


class _Features:
    """A frozen backbone and what it makes of a set."""

    def __init__(self, ctx: StageContext, ranks: Ranks) -> None:
        path = ctx.inputs["weights"].weights
        info = describe(load_state(path), path)
        classifier = build_classifier(
            ctx.recipe.model, num_classes=1, relative_position=info.relative_position
        )
        report = transfer_weights(classifier, path)
        ctx.logger.table("weights_account", report.table())
        self.network = classifier.to(ranks.device).eval()
        self.ctx, self.ranks = ctx, ranks

    def of(self, images: ShardSet) -> tuple[Tensor, Tensor]:
        """Features (M, C) and labels (M,) of a whole set, centre crops."""
        section = self.ctx.recipe.probe
        assert section is not None
        features, labels = extract_features(
            self.network.frozen_features,
            centre_batches(
                self.ctx, images, trained_augment(self.ctx), section.eval_crop_ratio, _BATCH, self.ranks
            ),
            num_images=len(images),
            width=self.network.feature_width,
            ranks=self.ranks,
        )
        return features.to(self.ranks.device), labels.to(self.ranks.device)
