"""Optimisers over parameter groups, and how their learning rate is set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vitpipe.config.recipe import OptimConfig

if TYPE_CHECKING:
    from timm.optim.lars import Lars


def build_optimiser(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`."""
    return build_adamw(groups, optim) if optim.name == "adamw" else build_lars(groups, optim)


def build_adamw(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`.

    On a GPU one fused kernel per group. On a CPU the grouped form: unlike the fused one it gives the same
    bits as the textbook loop over tensors, and a step's time is in the network there anyway.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    kind = {"fused": True} if on_gpu else {"foreach": True}
    return torch.optim.AdamW(list(groups), lr=0.0, betas=optim.betas, eps=optim.eps, **kind)


def build_lars(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> Lars:
    """LARS (You, Gitman and Ginsburg, arXiv 1708.03888) as MAE's linear probe has it.

    The learning rate of a matrix is scaled by trust coefficient * |weights| / |gradient|; vectors (norms,
    biases) learn by plain momentum.
    """
    # timm imports all its networks and torch's compiler: 2 s that no other optimiser needs.
    from timm.optim.lars import Lars

    adapted = [
        {**group, "always_adapt": any(parameter.ndim > 1 for parameter in group["params"])}
        for group in groups
    ]
    return Lars(adapted, lr=0.0, momentum=optim.momentum, trust_coeff=optim.trust_coefficient, eps=0.0)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]
