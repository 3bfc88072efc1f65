"""Deterministic weights and inputs, so that two implementations of one network can be compared by numbers.

`fill(state_dict)` overwrites every tensor as a function of its *key* alone, in place, and returns it:

* floating point, key ends in ``running_var``      -> 1 + 0.1 * |normal|
* floating point, key ends in ``running_mean``     -> 0.1 * normal
* floating point, 1-D and key ends in ``weight``   -> 1 + 0.1 * normal   (norm scales)
* any other floating point tensor                  -> 0.02 * normal, or 0.5/sqrt(fan_in) * normal if it has >= 2 dims
* integer or boolean tensor                        -> left as it is (index buffers, counters)

Keys are the *official* ones: fill first, convert afterwards. Leave out computed float buffers (keys ending in ``attn_mask``).

The normal draws come from a CPU ``torch.Generator`` seeded with ``zlib.crc32(key)``, in float32.

`probe(shape, seed=0)` is the input to feed: a float32 standard normal tensor from a CPU generator seeded with ``seed``.
`digest(tensor)` is what a golden file records of a tensor: shape, mean, std, and 16 values at evenly spaced flat positions.
"""

from __future__ import annotations

import math
import zlib

import torch


def fill(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for key, value in state_dict.items():
        if not torch.is_floating_point(value):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        normal = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        if key.endswith("running_var"):
            new = 1 + 0.1 * normal.abs()
        elif key.endswith("running_mean"):
            new = 0.1 * normal
        elif value.dim() == 1 and key.endswith("weight"):
            new = 1 + 0.1 * normal
        elif value.dim() >= 2:
            fan_in = value[0].numel()
            new = normal * 0.5 / math.sqrt(fan_in)
        else:
            new = 0.02 * normal
        value.copy_(new.to(value.dtype))
    return state_dict


def probe(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def digest(tensor: torch.Tensor) -> dict:
    flat = tensor.detach().float().flatten()
    at = torch.linspace(0, flat.numel() - 1, steps=min(16, flat.numel())).long()
    return {
        "shape": list(tensor.shape),
        "mean": flat.mean().item(),
        "std": flat.std(unbiased=False).item(),
        "values": [round(v, 6) for v in flat[at].tolist()],
    }
