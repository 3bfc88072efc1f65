"""Parameter groups compared with the released layer-decay map, name by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier, build_pretrainer
from vitpipe.models.hivit.conversion import our_name
from vitpipe.optim.groups import parameter_groups

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "itpn.json").read_text())["layer_decay"]
BASE = model_config({"name": "hivit_base"})


def _by_name(groups):
    return {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("recorded", GOLDEN, ids=lambda entry: entry["model"])
def test_fine_tuning_groups_are_the_released_ones(recorded):
    with torch.device("meta"):
        model = build_classifier(BASE, num_classes=1000)
    depths = model.backbone.shape.depths
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=recorded["weight_decay"],
        no_decay=model.no_decay,
        layer_of=model.layer_of,
        layer_scales=model.layer_scales(recorded["layer_decay_argument"]),
    )
    found = _by_name(groups)
    expected = {our_name(name, depths): row for name, row in recorded["parameters"].items()}
    assert found.keys() == expected.keys()
    for name, (layer, scale, decay) in expected.items():
        group = found[name]
        assert group["layer"] == layer, name
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-9), name
        assert group["weight_decay"] == decay, name


def test_pre_training_decays_positions_and_mask_token_but_no_vector():
    with torch.device("meta"):
        model = build_pretrainer(BASE)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.05, no_decay=model.no_decay)
    found = _by_name(groups)
    assert len(groups) == 2
    assert found["backbone.absolute_position"]["weight_decay"] == 0.05
    assert found["decoder.mask_token"]["weight_decay"] == 0.05
    assert all(g["lr_scale"] == 1.0 for g in groups)
    for name, parameter in model.named_parameters():
        assert found[name]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    named = [name for group in groups for name in group["names"]]
    assert sorted(named) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias"]
    assert sum(len(group["params"]) for group in groups) == len(named)
