"""Gradient clipping: over all parameters together, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPS = 1e-6  # in torch's factor, max_norm / (norm + eps), and in DINO's


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float | None, *, each: bool, measured: bool
) -> float | None:
    """Clip the gradients to an L2 norm.

    Args:
        parameters: those without a gradient are left out.
        max_norm: `None` clips nothing.
        each: of every tensor by itself (DINO), instead of all together.
        measured: compute the norm although nothing is clipped.

    Returns:
        The norm over all parameters before clipping, or `None` when it has not been computed.
    """
    # Reading all gradients once more costs 2 % of a step on a CPU, and on a GPU the host waits for the
    # result.
    if max_norm is None and not measured:
        return None
    gradients = [p.grad for p in parameters if p.grad is not None]
    if max_norm is not None and each:
        norms = torch._foreach_norm(gradients)
        factors = [(max_norm / (norm + _EPS)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, factors)
        return float(torch.linalg.vector_norm(torch.stack(list(norms))))
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
