"""Counted costs against the recorded ones, and against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitpipe.benchmarks.model_cost import CONVENTIONS, cost_of, measure_cost
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.models.build import build_classifier, build_pretrainer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "itpn.json").read_text())
RECORDED = {entry["model"]: entry for entry in GOLDEN["entries"]}


def test_the_base_classifier_as_recorded():
    cost, recorded = cost_of("hivit_base"), RECORDED["pixel_base_classifier"]
    assert cost.params == recorded["params"]
    assert 2 * cost.macs == recorded["complexity"]["flops"]
    assert round(cost.gmacs, 4) == recorded["complexity"]["gmacs"]
    assert round(cost.module_flops / 1e9, 3) == 16.888


def test_base_pretraining_as_recorded():
    recorded = RECORDED["pixel_base_pretrain"]
    cost = measure_cost(lambda: build_pretrainer(model_config({"name": "hivit_base"})), 224)
    assert cost.params == recorded["params"]
    assert 2 * cost.macs == recorded["complexity"]["flops"]


def test_large_as_published():
    cost = cost_of("hivit_large")
    assert (cost.params, round(cost.gmacs, 3)) == (288_493_576, 61.118)
    assert round(cost.module_flops / 1e9, 3) == 58.789
    cost = measure_cost(lambda: build_pretrainer(model_config({"name": "hivit_large"})), 224)
    assert (cost.params, round(cost.gmacs, 3)) == (318_239_456, 21.926)


class _Known(nn.Module):
    """A network whose costs fit on the back of an envelope."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 5, bias=False)
        self.frozen = nn.Parameter(torch.zeros(99), requires_grad=False)

    def forward(self, images):
        x = self.norm(self.conv(images).flatten(2).transpose(1, 2))
        x = F.scaled_dot_product_attention(x, x, x)
        return self.linear(x)


def test_a_network_counted_by_hand():
    cost = measure_cost(_Known, (16, 32))
    tokens = 4 * 8
    assert cost.params == (3 * 16 * 8 + 8) + 16 + 40 + 99
    products = 2 * tokens * tokens * 8
    assert cost.macs == tokens * 48 * 8 + products + tokens * 8 * 5
    assert cost.module_flops == tokens * 49 * 8 + 2 * tokens * 8 + tokens * 8 * 5
    assert cost.image_size == (16, 32)


def test_stored_activations_by_hand():
    model = nn.Sequential(nn.Linear(32, 7), nn.Sigmoid(), nn.Linear(7, 3))
    cost = measure_cost(lambda: model.to("meta"), 32)
    # Kept: the input of the first Linear, and the Sigmoid's output once, though two layers want it.
    assert cost.activation_bytes == 4 * (3 * 32 * 32 + 3 * 32 * 7)


def test_any_multiple_of_16_can_be_asked():
    small, large = cost_of("hivit_nano", image_size=64), cost_of("hivit_nano", image_size=128)
    tokens_only = 4 * small.macs
    assert large.macs > tokens_only
    with pytest.raises(InputError, match="100 pixels: the network needs a multiple of 16"):
        cost_of("hivit_nano", image_size=100)
    with pytest.raises(RecipeError, match="did you mean"):
        cost_of("hivit_bse")


def test_every_number_names_its_convention():
    rows = cost_of("hivit_nano", num_classes=10).table()
    assert [row["name"] for row in rows] == list(CONVENTIONS)
    assert "multiply-adds in conv, linear, attention products" in CONVENTIONS["macs"]


def test_counting_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_cost(
        lambda: build_classifier(model_config({"name": "hivit_nano", "image_size": 64}), num_classes=10), 64
    )
    assert torch.equal(torch.rand(3), expected)
