"""How many directions features really use: the effective rank (Roy and Vetterli, EUSIPCO 2007)."""

from __future__ import annotations

import torch

from vitpipe.evaluate.features import extract_features
from vitpipe.models.build import as_stored, build_encoder
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import centre_batches, open_sets, trained_augment

_BATCH = 16


def run(ctx: StageContext) -> dict[str, float]:
    """Write the table `eigenvalues`; `effective_rank` is the exponential of their entropy."""
    _, val_set = open_sets(ctx, used=("val",))
    path = ctx.inputs["weights"].weights
    network = build_encoder(as_stored(ctx.recipe.model, describe(load_state(path), path)))
    ctx.logger.table("weights_account", transfer_weights(network, path).table())
    network.to(ctx.ranks.device).eval()
    features_NC, _ = extract_features(
        network.frozen_features,
        centre_batches(ctx, val_set, trained_augment(ctx), 1.0, _BATCH),
        num_images=len(val_set),
        width=network.feature_width,
        ranks=ctx.ranks,
    )
    values_C = torch.linalg.eigvalsh(features_NC.double().T.cov()).clamp(min=0).flip(0)
    shares_C = values_C / values_C.sum()
    shown = values_C[: ctx.section.num_values].tolist()
    ctx.logger.table("eigenvalues", [{"number": i, "value": value} for i, value in enumerate(shown, 1)])
    return {"effective_rank": float(torch.special.entr(shares_C).sum().exp())}
