"""drloc's five released networks through `convert`: every key accounted for, whatever lies beside the weights."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from drloc_golden import official
from selfpatch_golden import keys

from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier
from vitpipe.models.convert import convert, convert_state
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import load_metadata, load_state

# Key list > kind, network, parameters of the MLP, tensors that the network computes itself.
RELEASED = {
    "swin_tiny": ("swin_classifier", "swin_tiny", 1_050_626, 17),
    "t2t_vit_14": ("t2t_classifier", "t2t_vit_14", 657_410, 0),
    "cvt_13": ("cvt_classifier", "cvt_13", 657_410, 0),
    "resnet50": ("resnet_classifier", "resnet50", 2_361_346, 0),
    "vit_base_16": ("vit_drloc", "vit_base_drloc", 1_050_626, 0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_of_a_released_network_has_its_row(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in keys(f"drloc_{name}")["keys"].items()}
    converted = convert_state(state)
    kind, model, num_location, num_computed = RELEASED[name]
    assert (converted.kind, converted.model) == (kind, model)
    rows = converted.report.rows
    assert {row.source for row in rows} == set(state)
    dropped = [row for row in rows if row.outcome == "dropped"]
    of_location = [row for row in dropped if row.source.startswith("drloc.")]
    assert len(of_location) == 6
    assert {row.why for row in of_location} == {"the localisation MLP of drloc, for its loss only"}
    assert sum(torch.Size(row.shape).numel() for row in of_location) == num_location
    computed = [row for row in dropped if row not in of_location]
    assert len(computed) == num_computed
    assert all(row.source.endswith(("attn_mask", "relative_position_index")) for row in computed)
    with torch.device("meta"):
        network = build_classifier(model_config({"name": model}), num_classes=1000)
    assert {row.target for row in rows if row.outcome == "renamed"} == set(converted.state)
    assert {n: t.shape for n, t in converted.state.items()} == {
        n: t.shape for n, t in network.state_dict().items()
    }
    # Without the MLP, as trained without the loss or released by others.
    bare = {key: tensor for key, tensor in state.items() if not key.startswith("drloc.")}
    assert convert_state(bare).state.keys() == converted.state.keys()
    # The code's classification modes have two more layers in the MLP.
    prefix = of_location[0].source.split("layers.")[0]
    more = {f"{prefix}unshared.{n}.weight": torch.empty(15, 512, device="meta") for n in range(2)}
    report = convert_state({**state, **more}).report
    assert {row.source for row in report.rows if row.outcome == "dropped"} > set(more)


@pytest.fixture
def configuration(monkeypatch):
    """What yacs's `CfgNode` becomes in a file: an object of a class that is not installed here."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = CfgNode(AUG=CfgNode(MIXUP=0.8), MODEL=CfgNode(NAME="cvt", DROP_PATH_RATE=0.2))
    node.__dict__ |= {"__immutable__": True, "__deprecated_keys__": {"OLD"}, "__new_allowed__": False}
    return node


@pytest.mark.parametrize("name", ["cvt_13", "resnet50"])
def test_a_training_file_with_its_configuration(name, configuration, tmp_path, monkeypatch):
    state = official(name)
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": state, "optimizer": optimiser, "lr_scheduler": {}, "max_accuracy": 90.3, "epoch": 99}
    torch.save({**content, "config": configuration}, tmp_path / "checkpoint.pth")
    for module in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, module)
    report = convert(tmp_path / "checkpoint.pth", tmp_path / "w.safetensors")
    assert len(report.rows) == len(state)
    assert load_metadata(tmp_path / "w.safetensors")["model"] == name
    network = build_classifier(model_config({"name": name}), num_classes=1000)
    moved = transfer_weights(network, tmp_path / "w.safetensors")
    assert moved.count("matched") == len(moved.rows) == len(network.state_dict())
    assert torch.equal(network.head.weight, state["head.weight" if name == "cvt_13" else "fc.weight"])


def test_the_checkpoint_of_the_authors_of_t2t(tmp_path):
    """Averaged weights under `state_dict_ema`, with a wrapper's prefix and without the MLP."""
    state = {key: t for key, t in official("t2t_vit_14").items() if not key.startswith("drloc.")}
    averaged = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"epoch": 309, "arch": "t2t_vit_14", "state_dict_ema": averaged}, tmp_path / "81.5.pth.tar")
    report = convert(tmp_path / "81.5.pth.tar", tmp_path / "w.safetensors")
    assert {row.outcome for row in report.rows} == {"renamed"}
    assert {row.source for row in report.rows} == set(state)
    found = load_state(tmp_path / "w.safetensors")
    table = torch.cat([found["backbone.class_position"], found["backbone.position"]], dim=1)
    assert torch.equal(table, state["pos_embed"])
    features = "tokens_to_token.attention2.w", "backbone.patch_embed.attention2.random_features"
    assert torch.equal(found[features[1]], state[features[0]])
    network = build_classifier(model_config({"name": "t2t_vit_14"}), num_classes=1000)
    assert transfer_weights(network, tmp_path / "w.safetensors").count("matched") == len(found)
