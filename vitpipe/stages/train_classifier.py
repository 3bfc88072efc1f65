"""Supervised classification: intermediate fine-tuning (ImageNet-22K) and final fine-tuning (ImageNet-1K).

data + weights > method > train > weights and averaged weights, each with its validation accuracy
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from vitpipe.config.resolve import TrainPlan
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.contracts.protocol import NOT_AVERAGED, PROTOCOL
from vitpipe.data.batches import Batch, ImageSet
from vitpipe.methods.method import Method
from vitpipe.models.network import Network
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import (
    EMA_WEIGHTS,
    accuracy_protocol,
    build_method,
    centre_batches,
    fit,
    judge,
    make_plan,
    open_sets,
    save_result,
    save_results,
    start_from_weights,
)
from vitpipe.train.validation import Validation


def run(ctx: StageContext) -> dict[str, float]:
    """Train a classifier and measure it on the validation set of the stage's dataset.

    Writes `weights.safetensors`, `ema.safetensors` where the recipe averages weights, and the tables
    `plan`, `weights_account`, `per_class`.

    Returns:
        `top1`, `top5`, `loss`, and the same with `ema_` for averaged weights.
    """
    section: ClassifyConfig = ctx.section
    sets = open_sets(ctx)
    # Classes of the data, not of the recipe: own sets need no number.
    method = build_method(ctx, section, sets[0].classes)
    assert isinstance(method.model, Network), f"{section.method.name} trains no network of a family"
    start = start_from_weights(ctx, method.model)
    plan = make_plan(ctx, section, sets[0])
    state = fit(ctx, method, plan, sets[0], start=start, validation=_validation(ctx, method, plan, sets))

    # Class names travel with the weights, so that a prediction has words.
    classes = json.dumps(sets[1].classes)
    measured = partial(
        judge, ctx, method, plan, sets, crop_ratio=section.eval_crop_ratio, batch=section.eval_batch
    )
    save_results(ctx, method, classes=classes)
    metrics = measured()
    measured_by = partial(accuracy_protocol, ctx, val_set=sets[1], augment=section.augment)
    protocol = measured_by(metrics, crop_ratio=section.eval_crop_ratio, EMA=NOT_AVERAGED)
    if state.average:
        # After the raw weights have been saved: the average takes their place in the same network.
        method.model.load_state_dict(state.average.shadow)
        save_result(ctx, method.model, EMA_WEIGHTS, classes=classes)
        averaged = measured(prefix="ema_")
        protocol += measured_by(averaged, crop_ratio=section.eval_crop_ratio, EMA=section.ema_decay)
        metrics |= averaged
    ctx.logger.table(PROTOCOL, protocol)
    return metrics


def _validation(
    ctx: StageContext, method: Method, plan: TrainPlan, sets: tuple[ImageSet, ImageSet]
) -> Validation | None:
    """Accuracy and loss on the validation set during training, every `validate_epochs`."""
    section: ClassifyConfig = ctx.section
    if section.validate_epochs is None:
        return None

    def measure() -> dict[str, float]:
        def crops(split: str) -> Iterator[Batch]:
            chosen = sets[0] if split == "train" else sets[1]
            return centre_batches(ctx, chosen, section.augment, section.eval_crop_ratio, section.eval_batch)

        found = method.judge(crops, ctx.ranks, plan.precision).metrics
        return {name: found[name] for name in ("top1", "loss") if name in found}

    return Validation(max(1, round(section.validate_epochs * plan.steps_per_epoch)), measure)
