"""The independent measurement: the written weights, loaded afresh, on the validation set; size and speed."""

from __future__ import annotations

from collections.abc import Callable

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.benchmarks.throughput import images_per_second
from vitpipe.contracts.protocol import NOT_AVERAGED, PROTOCOL, protocol_rows
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.models.network import Classifier
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import (
    accuracy_protocol,
    centre_batches,
    measured_classifier,
    open_sets,
    trained_augment,
)

# float32 here against the training's precision there: more than this is not rounding.
_AGREES_WITHIN = 0.002


def run(ctx: StageContext) -> dict[str, float]:
    """Evaluate the `weights` input in float32.

    Tables: `per_class`, `confusion` (pairs that occur), `cost` (with conventions), `agreement` (beside
    what the training stage measured), `protocol`.

    Returns:
        `top1`, `top5`, `loss`, `params`, `gmacs`, `images_per_second`.

    Raises:
        CheckpointError: when the weights are not those of a classifier of this recipe's model.
    """
    section, ranks, side = ctx.recipe.evaluate, ctx.ranks, ctx.recipe.model.image_size
    _, val_set = open_sets(ctx, used=("val",))
    model, build = measured_classifier(ctx, val_set)
    accuracy = evaluate_classifier(
        model,
        centre_batches(ctx, val_set, trained_augment(ctx), section.eval_crop_ratio, section.batch),
        model.num_classes,
        ranks=ranks,
        # float32, as published numbers are measured; training may have evaluated in bfloat16.
        precision="off",
    )
    speed = images_per_second(
        model,
        image_size=side,
        batch=section.throughput_batch,
        rounds=section.throughput_rounds,
        device=ranks.device,
    )
    ctx.logger.table("per_class", accuracy.class_rows(val_set.classes))
    ctx.logger.table("confusion", accuracy.confusion_rows(val_set.classes))
    _compare(ctx, accuracy.metrics())
    measured = accuracy_protocol(
        ctx,
        accuracy.metrics(),
        val_set,
        trained_augment(ctx),
        section.eval_crop_ratio,
        EMA=NOT_AVERAGED,
    )
    head = f"classifier with its {model.num_classes}-class head"
    counted = protocol_rows(["params"], {"counted": head})
    counted += protocol_rows(
        ["gmacs"], {"counted": f"multiply-adds of the {head}", "image": f"{side} pixels"}
    )
    ctx.logger.table(PROTOCOL, measured + counted)
    return {**accuracy.metrics(), **_cost(ctx, build), "images_per_second": speed}


def _cost(ctx: StageContext, build: Callable[[], Classifier]) -> dict[str, float]:
    # Built anew on the meta device: hooks and counted operators must not touch the measured network.
    cost = measure_cost(build, ctx.recipe.model.image_size)
    ctx.logger.table("cost", cost.table())
    return {"params": float(cost.params), "gmacs": cost.gmacs}


def _compare(ctx: StageContext, measured: dict[str, float]) -> None:
    """Put our numbers beside those of the training stage; say so when they differ by more than rounding."""
    trained = ctx.inputs["weights"]
    shared = [name for name in measured if name in trained.metrics]
    rows = [
        {
            "metric": name,
            trained.card.stage: trained.metrics[name],
            "evaluate": measured[name],
            "difference": measured[name] - trained.metrics[name],
        }
        for name in shared
    ]
    ctx.logger.table("agreement", rows)
    if "top1" in shared and abs(measured["top1"] - trained.metrics["top1"]) > _AGREES_WITHIN:
        ctx.logger.say(
            f"top1 is {measured['top1']:.4f} here, {trained.metrics['top1']:.4f} in {trained.card.stage}: "
            "compare eval_crop_ratio and precision of the two sections"
        )
