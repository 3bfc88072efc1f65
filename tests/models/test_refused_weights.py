"""Checkpoints whose tensors are no weights of a network that vitpipe has: refused, and named."""

from __future__ import annotations

import pytest
import torch

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.convert import convert_state

VIT = {
    "cls_token": torch.zeros(1, 1, 1280),
    "patch_embed.proj.weight": torch.zeros(1280, 3, 16, 16),
    **{f"blocks.{n}.attn.qkv.weight": torch.zeros(3, 1280) for n in range(32)},
}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (VIT, "a ViT of 32 blocks and 1280 channels, patches of 16 pixels"),
        (
            {f"module.backbone.{name}": tensor for name, tensor in VIT.items()},
            "a ViT of 32 blocks and 1280 channels",
        ),
        ({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, "a ResNet"),
    ],
)
def test_another_network_is_named_as_what_it_is(state, named):
    with pytest.raises(CheckpointError, match=f"is of {named}.*which vitpipe does not have"):
        convert_state(state)


@pytest.mark.parametrize(
    ("name", "tensor", "shown"),
    [
        ("head.weight", torch.tensor(1.0), r"head.weight \(\) of float32"),
        ("norm.bias", torch.zeros(0), r"norm.bias \(0,\) of float32"),
        ("head.weight", torch.zeros(10, 4, dtype=torch.int64), r"head.weight \(10, 4\) of int64"),
    ],
)
def test_what_cannot_be_a_parameter_is_refused_before_sizes_are_read(official_nano, name, tensor, shown):
    state = {**official_nano["pixel_base_classifier"], name: tensor}
    with pytest.raises(CheckpointError, match=rf"1 of \d+ tensors cannot be parameters: {shown}"):
        convert_state(state)


def test_weights_that_are_not_finite_are_refused(official_nano):
    state = dict(official_nano["pixel_base_classifier"])
    state["head.weight"] = state["head.weight"] * float("nan")
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ tensors with values that are not finite: head.weight"
    ):
        convert_state(state)
