"""The linear classifier of the papers: augmented images through the frozen network in every epoch."""

from __future__ import annotations

import torch

from vitpipe.data.mixup import Mixup
from vitpipe.evaluate.accuracy import Accuracy, evaluate_classifier
from vitpipe.methods.classify.method import Classify
from vitpipe.models.frozen import FrozenProbe
from vitpipe.models.network import Encoder
from vitpipe.models.weights import save_weights
from vitpipe.stages.context import StageContext
from vitpipe.stages.probe.config import LinearConfig
from vitpipe.stages.training import centre_batches, fit, make_plan, open_sets, seed_model
from vitpipe.train.validation import Validation

LINEAR_WEIGHTS = "linear.safetensors"
_BEST = "best_epoch_top1"


def train_on_augmented(
    ctx: StageContext, network: Encoder, linear: LinearConfig, batch: int
) -> dict[str, float]:
    """Train a linear layer through the frozen network; writes `linear.safetensors`.

    Args:
        batch: images at a time when measuring.

    Returns:
        `linear_top1` on the validation images, and `linear_best_epoch_top1` where the section asks for it.
    """
    train_set, val_set = open_sets(ctx)
    num_classes = len(train_set.classes)
    seed_model(ctx)
    section = ctx.section
    probe = FrozenProbe(
        network, num_classes, last_blocks=section.last_blocks, standardise=section.standardise
    )
    # Linear probes of the papers train with plain cross entropy; mixing follows the recipe's augment.
    mix = Mixup(linear.augment, num_classes, label_smoothing=0.0)
    # Saved states leave the frozen network out: it is loaded from the `weights` input anyway.
    method = Classify(probe, mix, train_set.classes, frozen=("model.network",))
    plan = make_plan(ctx, linear, train_set)

    def accuracy() -> Accuracy:
        return evaluate_classifier(
            probe,
            centre_batches(ctx, val_set, linear.augment, section.eval_crop_ratio, batch),
            num_classes,
            ranks=ctx.ranks,
            precision=plan.precision,
        )

    def measure() -> dict[str, float]:
        found = accuracy()
        method.get_buffer(_BEST).clamp_(min=found.top1)
        return {"top1": found.top1, "loss": found.loss}

    validation = None
    if section.best_epoch:
        # A buffer is part of the saved states: a resumed run knows the epochs before it.
        method.register_buffer(_BEST, torch.zeros((), dtype=torch.float64))
        validation = Validation(plan.steps_per_epoch, measure)
    fit(ctx, method, plan, train_set, linear, validation=validation)
    if ctx.is_main:
        save_weights(probe.head(), ctx.folder / LINEAR_WEIGHTS)
    last = accuracy()
    ctx.logger.table("linear_per_class", last.class_rows(val_set.classes))
    best = {"linear_best_epoch_top1": float(method.get_buffer(_BEST))} if section.best_epoch else {}
    return {"linear_top1": last.top1, **best}
