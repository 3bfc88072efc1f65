"""Recorded numbers of the released code of SelfPatch, DINO and MoBY, and states filled by name."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative, as the recording states

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec is not None
assert _spec.loader is not None
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)
ENTRIES: dict[str, Any] = {
    e["name"]: e for e in json.loads((GOLDEN / "selfpatch.json").read_text())["entries"]
}


def probe(text: str) -> Tensor:
    """The input that a text such as `probe([1, 3, 96, 96], seed=1)` describes."""
    found = re.fullmatch(r"probe\(\[(.+)\], seed=(\d+)\)", text)
    assert found, text
    return fill.probe(tuple(map(int, found[1].split(","))), int(found[2]))


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Official names and shapes -> their tensors."""
    return fill.fill({name: torch.zeros(shape) for name, shape in shapes.items()})


def keys(name: str) -> dict[str, Any]:
    """The key list of an official checkpoint."""
    return json.loads((GOLDEN / "keys" / f"{name}.json").read_text())


def error(ours: Tensor, recorded: dict[str, Any]) -> float:
    """Largest error of a recorded digest, relative to its largest value; infinite for another shape."""
    digest = fill.digest(ours)
    if digest["shape"] != recorded["shape"]:
        return float("inf")
    scale = max(abs(value) for value in recorded["values"])
    pairs = [*zip(digest["values"], recorded["values"], strict=True)]
    pairs += [(digest["mean"], recorded["mean"]), (digest["std"], recorded["std"])]
    return max(abs(a - b) for a, b in pairs) / scale
