"""Mixed precision: autocast of the forward pass, and loss scaling for fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vitpipe.config.resolve import Precision

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context for a forward pass; weights stay float32, `off` changes nothing."""
    # Not autocast(enabled=False): that would also switch off an autocast around this one.
    if precision == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])


def grad_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Loss scaling for fp16; a scaler that does nothing for the other precisions."""
    # fp16's smallest normal number is 6e-5, and many gradients are smaller; bf16 has float32's exponents.
    # torch's defaults: scale 65536, halved after an overflow, doubled after 2,000 steps without one.
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
