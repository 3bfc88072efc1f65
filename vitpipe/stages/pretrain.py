"""Masked pre-training on pixels: data > network > method > loop > weights, loss on unseen images, picture."""

from __future__ import annotations

from vitpipe.config.recipe import PretrainConfig
from vitpipe.config.resolve import TRAIN_SET
from vitpipe.data.image_grid import optional_figure
from vitpipe.data.shards import ShardSet
from vitpipe.evaluate.reconstruct import image_noise, masked_loss, reconstruct, save_columns
from vitpipe.methods.masked_pixels import MaskedPixels
from vitpipe.models.build import build_pretrainer
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

_NUM_SHOWN = 6  # columns of the figure


def run(ctx: StageContext) -> dict[str, float]:
    """Pre-train; write the whole network's weights and the figure `reconstructions`.

    Returns:
        `loss`: on masked units of the validation images, each with a fixed mask of its own.
    """
    section: PretrainConfig = ctx.section
    train_set, val_set = open_sets(ctx, TRAIN_SET[ctx.stage])
    seed_model(ctx)
    model = build_pretrainer(ctx.recipe.model, mask_ratio=section.mask_ratio)
    start = start_from_weights(ctx, model)
    method = MaskedPixels(model)
    plan = make_plan(ctx, section, train_set)
    fit(ctx, method, network_groups(model, section.optim), plan, train_set, start=start)
    save_result(ctx, model)

    loss = masked_loss(
        method,
        centre_batches(ctx, val_set, section.augment, 1.0, plan.micro_batch),
        seed=ctx.recipe.seed,
        ranks=ctx.ranks,
        precision=plan.precision,
    )
    if ctx.is_main:
        with optional_figure("reconstructions", ctx.logger.say):
            _draw(ctx, section, method, val_set)
    return {"loss": loss}


def _draw(ctx: StageContext, section: PretrainConfig, method: MaskedPixels, val_set: ShardSet) -> None:
    """Original, visible part and prediction for the first validation images."""
    batch = next(centre_batches(ctx, val_set, section.augment, 1.0, _NUM_SHOWN, is_shared=False))
    device = ctx.ranks.device
    # The masks of `masked_loss`: the figure shows what the number measures.
    noise_BN = image_noise(batch.indices_B, method.model.num_units, ctx.recipe.seed).to(device)
    images = batch.images_BCHW.to(device)
    path = ctx.folder / "reconstructions.png"
    save_columns(
        [images, *reconstruct(method, images, noise_BN)], section.augment.mean, section.augment.std, path
    )
    ctx.logger.figure("reconstructions", path)
