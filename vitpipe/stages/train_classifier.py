"""Supervised classification: intermediate fine-tuning (ImageNet-22K) and final fine-tuning (ImageNet-1K).

data + weights > classifier > train > weights and averaged weights, each with its validation accuracy
"""

from __future__ import annotations

import json

from vitpipe.config.recipe import ClassifyConfig
from vitpipe.config.resolve import TRAIN_SET, TrainPlan
from vitpipe.contracts.artifact import WEIGHTS
from vitpipe.data.mixup import Mixup
from vitpipe.data.shards import ShardSet
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.methods.classify import Classify
from vitpipe.models.build import build_classifier
from vitpipe.models.network import Classifier
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import (
    centre_batches,
    fit,
    make_plan,
    network_groups,
    open_sets,
    save_result,
    seed_model,
    start_from_weights,
)

EMA_WEIGHTS = "ema.safetensors"


def run(ctx: StageContext) -> dict[str, float]:
    """Train a classifier and measure it on the validation set of the stage's dataset.

    Writes `weights.safetensors`, `ema.safetensors` where the recipe averages weights, and the tables
    `plan`, `weights_account`, `per_class`.

    Returns:
        `top1`, `top5`, `loss`, and the same with `ema_` for averaged weights.
    """
    section: ClassifyConfig = ctx.section
    train_set, val_set = open_sets(ctx, TRAIN_SET[ctx.stage])
    num_classes = len(train_set.classes)  # of the data, not of the recipe: own sets need no number
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
    plan = make_plan(ctx, section, train_set)
    state = fit(ctx, method, network_groups(model, section.optim), plan, train_set, start=start)

    metrics = _measure_and_save(ctx, model, val_set, plan)
    if state.average:
        # After the raw weights have been saved: the average takes their place in the same network.
        model.load_state_dict(state.average.shadow)
        metrics |= _measure_and_save(ctx, model, val_set, plan, "ema_", EMA_WEIGHTS)
    return metrics


def _measure_and_save(
    ctx: StageContext,
    model: Classifier,
    val_set: ShardSet,
    plan: TrainPlan,
    prefix: str = "",
    file_name: str = WEIGHTS,
) -> dict[str, float]:
    """Evaluate a trained classifier and write it; `prefix` goes before the names of metrics and table."""
    section: ClassifyConfig = ctx.section
    accuracy = evaluate_classifier(
        model,
        centre_batches(ctx, val_set, section.augment, section.eval_crop_ratio, section.eval_batch),
        model.num_classes,
        ranks=ctx.ranks,
        precision=plan.precision,
    )
    ctx.logger.table(f"{prefix}per_class", accuracy.class_rows(val_set.classes))
    # Class names travel with the weights, so that a prediction has words.
    save_result(ctx, model, file_name, classes=json.dumps(val_set.classes))
    return {prefix + name: value for name, value in accuracy.metrics().items()}
