"""Pre-training by any method: data > method > loop > weights, and what the method is measured by."""

from __future__ import annotations

from vitpipe.models.network import Network
from vitpipe.stages.context import StageContext
from vitpipe.stages.pretrain.config import PretrainConfig
from vitpipe.stages.training import (
    build_method,
    fit,
    judge,
    make_plan,
    open_sets,
    save_results,
    start_from_weights,
)


def run(ctx: StageContext) -> dict[str, float]:
    """Pre-train; write the method's results, of which `weights.safetensors` is what later stages start from.

    Returns:
        The method's own measure on the validation images, for masked pixels `loss`.
    """
    section: PretrainConfig = ctx.section
    sets = open_sets(ctx)
    method = build_method(ctx, section, sets[0].classes)
    assert isinstance(method.model, Network), f"{section.method.name} trains no network of a family"
    start = start_from_weights(ctx, method.model)
    plan = make_plan(ctx, section, sets[0])
    fit(ctx, method, plan, sets[0], start=start)
    save_results(ctx, method)
    # Whole images: no published number depends on this crop.
    return judge(ctx, method, plan, sets, crop_ratio=1.0, batch=plan.micro_batch)
