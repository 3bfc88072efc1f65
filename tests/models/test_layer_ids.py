"""Layer ids of parameters for layer-wise learning rates: three rules, checked by official names."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier, build_dense
from vitpipe.models.hivit.conversion import our_name
from vitpipe.models.hivit.hivit import SHAPES, dense_layer_index
from vitpipe.optim.groups import parameter_groups

BASE, LARGE = SHAPES["hivit_base"].depths, SHAPES["hivit_large"].depths


def test_fine_tuning_of_base_as_recorded(golden):
    """From our network's names to the optimiser's groups, against the map of the official code."""
    recorded = golden.numbers["layer_decay"][0]
    shapes = golden.keys(recorded["model"])["keys"]
    table = next(value for value in recorded.values() if isinstance(value, dict))
    assert set(table) == set(shapes) - {"relative_position_index"}
    with torch.device("meta"):
        model = build_classifier(model_config({"name": "hivit_base"}), num_classes=1000)
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=recorded["weight_decay"],
        no_decay=model.no_decay,
        layer_of=model.layer_of,
        layer_scales=model.layer_scales(recorded["layer_decay_argument"]),
    )
    ours = {name: group for group in groups for name in group["names"]}
    assert len(ours) == len(table)
    for official, (layer, scale, weight_decay) in table.items():
        group = ours[our_name(official, BASE)]
        assert (group["layer"], group["weight_decay"]) == (layer, weight_decay), official
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-9), official


@pytest.mark.parametrize(("size", "depths"), [("base", BASE), ("large", LARGE)])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_rules_count_merges(golden, size, depths, task):
    last = sum(depths) + 1
    prefix = {"detect": "det", "segment": "seg"}[task]
    for official in golden.keys(f"{prefix}_pixel_{size}")["keys"]:
        if official == "relative_position_index":
            continue
        name = "backbone.network." + our_name(official, depths)
        if official.startswith("blocks."):
            expected = int(official.split(".")[1]) + 1
        elif official.startswith("patch_embed"):
            expected = 0
        elif official == "absolute_pos_embed":
            expected = last if task == "detect" else 0
        else:
            expected = last
        assert dense_layer_index(name, depths, task) == expected, official
    assert dense_layer_index("roi_head.bbox_head.0.fc_cls.weight", depths, task) == last


@pytest.mark.parametrize(
    ("depths", "layer_decay", "task", "expected"),
    [
        (BASE, 0.90, "detect", 1.1111),
        (LARGE, 0.95, "detect", 1.0526),
        (BASE, 0.90, "segment", 1.0437),
        (LARGE, 0.95, "segment", 1.0146),
    ],
)
def test_the_last_block_learns_faster_than_the_heads(depths, layer_decay, task, expected):
    model = model_config({"name": "hivit_base" if depths == BASE else "hivit_large"})
    with torch.device("meta"):
        net = build_dense(model, task, image_size=224)
    scales = net.layer_scales(layer_decay)
    last = f"backbone.stage16.{depths[2] - 1}.mlp.fc1.weight"
    assert scales[net.layer_of(last)] == pytest.approx(expected, abs=1e-3)
    assert scales[net.head_layer] == scales[net.layer_of("pyramid.lateral8.weight")] == 1.0
    factor = layer_decay if task == "detect" else layer_decay ** (13 / (sum(depths) + 2))
    assert scales[net.layer_of("backbone.stem.proj.weight")] == pytest.approx(factor ** (sum(depths) + 1))
