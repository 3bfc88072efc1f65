"""AdamW over parameter groups, and how its learning rate is set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vitpipe.config.recipe import OptimConfig


def build_adamw(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`.

    On a GPU one fused kernel per group. On a CPU the grouped form: unlike the fused one it gives the same
    bits as the textbook loop over tensors, and a step's time is in the network there anyway.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    kind = {"fused": True} if on_gpu else {"foreach": True}
    return torch.optim.AdamW(list(groups), lr=0.0, betas=optim.betas, eps=optim.eps, **kind)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]
