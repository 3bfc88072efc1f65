"""Recorded numbers of drloc's released code, and its networks' states filled by name."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from selfpatch_golden import GOLDEN, fill, keys
from torch import Tensor

NUMBERS: dict[str, Any] = json.loads((GOLDEN / "drloc.json").read_text())
MODELS: dict[str, Any] = {entry["model"]: entry for entry in NUMBERS["models"]}
# As the recording suggests for networks.
RELATIVE, ABSOLUTE = 1e-3, 1e-4


def official(name: str) -> dict[str, Tensor]:
    """The filled state of an official network with the localisation MLP, such as `t2t_vit_14`."""
    shapes = keys(f"drloc_{name}")["keys"]
    counters = {key: torch.int64 for key in shapes if key.endswith(("_tracked", "_index"))}
    empty = {key: torch.zeros(shape, dtype=counters.get(key)) for key, shape in shapes.items()}
    state: dict[str, Tensor] = fill.fill(empty)
    for key, tensor in state.items():
        if key.endswith(".g"):  # gains with four dimensions, which `fill` takes for a convolution
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
    return state


def probe(*shape: int) -> Tensor:
    """The recorded input of this shape."""
    found: Tensor = fill.probe(shape, 0)
    return found


def excess(ours: Tensor, recorded: dict[str, Any]) -> float:
    """Largest error of a recorded digest over its tolerance; infinite for another shape."""
    digest = fill.digest(ours)
    if digest["shape"] != recorded["shape"]:
        return float("inf")
    pairs = [*zip(digest["values"], recorded["values"], strict=True)]
    pairs += [(digest["mean"], recorded["mean"]), (digest["std"], recorded["std"])]
    return max(abs(a - b) / (ABSOLUTE + RELATIVE * abs(b)) for a, b in pairs)
