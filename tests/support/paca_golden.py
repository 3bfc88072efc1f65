"""Recorded numbers of the released code of PaCa-ViT, and networks with its filled weights."""

from __future__ import annotations

import json
from typing import Any

import torch
from selfpatch_golden import GOLDEN, fill, filled, keys
from torch import Tensor

from vitpipe.models.convert import convert_state
from vitpipe.models.weights import load_into

ENTRIES: dict[str, Any] = json.loads((GOLDEN / "paca.json").read_text())["entries"]
TOLERANCE = 2e-5  # times the larger of 1 and the standard deviation, as the recording suggests
# By these the last map of each clustering is multiplied: otherwise assignments are nearly uniform.
_FACTORS = {
    "attn.clustering.clustering.4.weight": 40.0,
    "attn.clustering.clustering.2.weight": 10.0,
    "decode_head.clustering.1.weight": 40.0,
}
_TEACHER = 150.0


def shapes_of(name: str) -> dict[str, list[int]]:
    """The key list of an official checkpoint."""
    found: dict[str, list[int]] = keys(name)["shapes"]
    return found


def official(name: str, **changed: list[int]) -> dict[str, Tensor]:
    """The filled state of an official network.

    Args:
        changed: other shapes, by name with `__` for dots.
    """
    shapes = {**shapes_of(name), **{key.replace("__", "."): shape for key, shape in changed.items()}}
    return filled_shapes(shapes)


def filled_shapes(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Names and shapes -> their tensors by the recording's rule."""
    state = filled(shapes)
    line = torch.tensor([1.0, 2.0, 1.0])
    has_conv = any(name.endswith("clustering.clustering.4.weight") for name in state)
    for name, tensor in state.items():
        if name.endswith("blur_filter"):
            tensor.copy_(torch.outer(line, line) / 16)
        elif "paca_teacher.to_clusters" in name and name.endswith(".weight"):
            tensor.mul_(_TEACHER)
        for end, factor in _FACTORS.items():
            if name.endswith(end) and not (end.endswith(".2.weight") and has_conv):
                tensor.mul_(factor)
    return state


def loaded(network: torch.nn.Module, state: dict[str, Tensor]) -> torch.nn.Module:
    """The network with an official state."""
    load_into(network, convert_state(state).state)
    return network


def probe(entry: dict[str, Any]) -> Tensor:
    """The input of an entry."""
    found: Tensor = fill.probe(tuple(entry["input"]["shape"]), entry["input"]["seed"])
    return found


def error(ours: Tensor, recorded: dict[str, Any]) -> float:
    """Largest error of a recorded digest in units of the tolerance's scale; infinite for another shape."""
    digest = fill.digest(ours)
    if digest["shape"] != recorded["shape"]:
        return float("inf")
    pairs = [*zip(digest["values"], recorded["values"], strict=True)]
    pairs += [(digest["mean"], recorded["mean"]), (digest["std"], recorded["std"])]
    return max(abs(a - b) for a, b in pairs) / max(1.0, recorded["std"])
