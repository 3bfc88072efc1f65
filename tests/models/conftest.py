"""Recorded numbers of the released code and checkpoints filled from them, for the tests of the networks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vitpipe.config.model import ModelConfig, model_config
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer
from vitpipe.models.hivit.config import DecoderConfig, PyramidConfig
from vitpipe.models.hivit.conversion import our_name
from vitpipe.models.hivit.hivit import SHAPES

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden:
    """The recorded numbers, and official states whose tensors are a function of their names."""

    folder = GOLDEN

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = json.loads((GOLDEN / "itpn.json").read_text())
        spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
        assert spec is not None
        assert spec.loader is not None
        self.fill: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.fill)

    def keys(self, name: str) -> dict[str, Any]:
        """The key list of an official network, for example `pixel_base_pretrain`."""
        return json.loads((GOLDEN / "keys" / f"itpn_{name}.json").read_text())

    def entry(self, name: str) -> dict[str, Any]:
        """Inputs and recorded outputs of an official network."""
        return next(entry for entry in self.numbers["entries"] if entry["model"] == name)

    def empty_state(self, name: str, device: str = "meta") -> dict[str, torch.Tensor]:
        """The official state, unfilled; on the meta device it takes no memory."""
        return {
            key: torch.zeros(
                shape, device=device, dtype=torch.int64 if key.endswith("_index") else torch.float32
            )
            for key, shape in self.keys(name)["keys"].items()
        }

    def state(self, name: str, post_fill: bool) -> dict[str, torch.Tensor]:
        """The official state, filled; with `post_fill` also after the rules of that name."""
        state = self.fill.fill(self.empty_state(name, "cpu"))
        for rule in self.numbers["post_fill"] if post_fill else ():
            for key, tensor in state.items():
                if key.endswith(rule["key_endswith"]):
                    tensor.mul_(rule["value"]) if rule["op"] == "mul" else tensor.add_(rule["value"])
        return state

    def errors(self, ours: dict[str, torch.Tensor], recorded: dict[str, Any]) -> dict[str, float]:
        """Largest error of each recorded entry, relative to its largest recorded value; infinite for a shape."""
        found: dict[str, float] = {}
        for name, tensor in ours.items():
            digest, expected = self.fill.digest(tensor), recorded[name]
            scale = max(abs(v) for v in expected["values"])
            pairs = [*zip(digest["values"], expected["values"], strict=True)]
            pairs += [(digest["mean"], expected["mean"]), (digest["std"], expected["std"])]
            error = max(abs(a - b) for a, b in pairs) / scale
            found[name] = error if digest["shape"] == expected["shape"] else float("inf")
        return found


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def nano() -> ModelConfig:
    """The demo's network at the smallest image size that can be masked well: 4 x 4 units."""
    return model_config(
        {
            "name": "hivit_nano",
            "image_size": 64,
            "pyramid": PyramidConfig(width=48, depth=2),
            "decoder": DecoderConfig(width=64, depth=2, heads=4),
        }
    )


@pytest.fixture(scope="module")
def official_nano(golden, nano):
    """The demo's network under official names: the base key list with the blocks renumbered."""
    depths = SHAPES["hivit_nano"].depths
    blocks = {0: [0], 3: [1], 4: [2], 7: [3], 8: [4, 5, 6, 7]}
    torch.manual_seed(3)
    states = {
        "pixel_base_pretrain": build_pretrainer(nano).state_dict(),
        "pixel_base_classifier": build_classifier(nano, num_classes=10).state_dict(),
        "seg_pixel_base": build_dense(nano, "segment", image_size=128).state_dict(),
    }
    found = {}
    for name, ours in states.items():
        official = {}
        for key in golden.keys(name)["keys"]:
            _, _, rest = key.partition(".")
            index, _, tail = rest.partition(".")
            numbers = blocks.get(int(index), []) if key.startswith("blocks.") else [None]
            for number in numbers:
                new_key = key if number is None else f"blocks.{number}.{tail}"
                if (tensor := ours.get(our_name(new_key, depths) or "")) is not None:
                    official[new_key] = tensor
        assert len(official) == len(ours)
        found[name] = official
    return found
