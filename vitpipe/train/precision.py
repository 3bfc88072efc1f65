"""Mixed precision: which type the forward pass computes in, and loss scaling where that needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vitpipe.config.resolve import Precision

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context for a forward pass; weights stay float32, `off` changes nothing."""
    if precision == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])


def grad_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Loss scaling for fp16, whose small gradients would vanish; does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
