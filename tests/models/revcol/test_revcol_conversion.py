"""Conversion of released RevCol checkpoints: the container, malicious and damaged files, every key."""

from __future__ import annotations

import builtins
import contextlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from revcol_official import official_state

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.build import build_classifier
from vitpipe.models.convert import convert, convert_state, read_checkpoint
from vitpipe.models.revcol.heads import RevColHeads
from vitpipe.models.revcol.revcol import SHAPES, RevCol
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import load_into, load_metadata, load_state

KEYS = sorted((Path(__file__).parents[2] / "golden" / "keys").glob("revcol_*.json"))
MICRO = model_config({"name": "revcol_micro", "image_size": 64})


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return RevCol(SHAPES["revcol_micro"], 10).state_dict()


@pytest.fixture
def make_settings(monkeypatch):
    """Settings as in released files: of a class whose package is not installed when they are read."""
    cfg_node = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})

    def make(**values):
        module = types.ModuleType("yacs.config")
        module.CfgNode = cfg_node
        monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        found = cfg_node(values)
        # What that class remembers of itself; pickled as the object's attributes.
        found.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __new_allowed__=False)
        return found

    return make


def _save(path, make_settings, monkeypatch, **changes):
    """Write a file as the released code does, then remove its settings' package again."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    content = {
        "model": {},
        "optimizer": optimizer.state_dict(),
        "max_accuracy": 82.2,
        "epoch": 299,
        "state_dict_ema": None,
        "input": input,
        "config": make_settings(MODEL=make_settings(NAME="revcol", DEPTH=[2, 2], DROP=0.1), AMP=True),
        **changes,
    }
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    return path


def _heads(file):
    recorded = json.loads(file.read_text())
    return recorded, any(name.startswith("cls_blocks.") for name in recorded)


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_every_released_network_is_known(file):
    recorded, supervised = _heads(file)
    official = {name: torch.empty(shape, device="meta") for name, shape in recorded.items()}
    converted = convert_state(official)
    assert converted.kind == "revcol_classifier"
    assert converted.model == "_".join(file.stem.split("_")[:2])
    rows = converted.report.rows
    assert [row.source for row in rows] == list(official)
    dropped = {row.source for row in rows if row.outcome == "dropped"}
    renamed = {row.source: row.target for row in rows if row.outcome == "renamed"}
    assert {name.split(".")[0] for name in dropped} == (
        {"cls_blocks", "decoder_blocks"} if supervised else set()
    )
    assert renamed == (
        {
            f"cls_blocks.3.classifier.{layer}.{kind}": f"cls.classifier.{layer}.{kind}"
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
        if supervised
        else {}
    )
    assert len(converted.state) == len(official) - len(dropped)


def test_a_file_as_released(state, make_settings, monkeypatch, tmp_path):
    path = _save(tmp_path / "a.pth", make_settings, monkeypatch, model=state)
    report = convert(path, tmp_path / "a.safetensors", kind="revcol_classifier")
    assert report.count("matched") == len(report.rows) == len(state)
    assert load_metadata(tmp_path / "a.safetensors")["model"] == "revcol_micro"
    same = build_classifier(MICRO, num_classes=10)
    assert transfer_weights(same, tmp_path / "a.safetensors").count("matched") == len(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    other = build_classifier(MICRO, num_classes=7)
    report = transfer_weights(other, tmp_path / "a.safetensors")
    fresh = {row.target for row in report.rows if row.outcome == "fresh"}
    assert fresh == {"cls.classifier.1.weight", "cls.classifier.1.bias"}


def test_averaged_weights_if_they_are_asked_for(state, make_settings, monkeypatch, tmp_path):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = _save(tmp_path / "a.pth", make_settings, monkeypatch, model=state, state_dict_ema=averaged)
    assert torch.equal(read_checkpoint(path)["stem.0.bias"], state["stem.0.bias"])
    convert(path, tmp_path / "a.safetensors", entry="state_dict_ema")
    assert torch.equal(load_state(tmp_path / "a.safetensors")["stem.0.bias"], state["stem.0.bias"] + 1)
    with pytest.raises(CheckpointError, match="no weights in its entry module"):
        read_checkpoint(path, "module")


@torch.no_grad()
def test_intermediate_supervision_leaves_the_last_classifier(monkeypatch, make_settings, tmp_path):
    torch.manual_seed(1)
    shape = SHAPES["revcol_nano"]
    trained, heads = RevCol(shape, 10).eval(), RevColHeads(shape, 10).eval()
    for name, parameter in trained.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.3)
    path = _save(tmp_path / "a.pth", make_settings, monkeypatch, model=official_state(trained, heads))
    report = convert(path, tmp_path / "a.safetensors")
    assert (report.count("renamed"), report.count("unused")) == (4, 0)
    assert "intermediate supervision" in report.summary()
    ours = RevCol(shape, 10).eval()
    load_into(ours, load_state(tmp_path / "a.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), heads(trained, images).logits[-1])


class _Evil:
    """An object of a malicious file: restoring it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class _Asks:
    """A file that not only names the function `input` but calls it."""

    def __reduce__(self):
        return (input, ("your password, please",))


def test_code_in_a_file_is_not_run(state, make_settings, monkeypatch, tmp_path):
    path = _save(
        tmp_path / "a.pth", make_settings, monkeypatch, model=state, config=_Evil(tmp_path / "owned")
    )
    assert read_checkpoint(path).keys() == state.keys()
    path = _save(tmp_path / "b.pth", make_settings, monkeypatch, model=state, input=_Asks())
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a checkpoint asked the user"))
    assert read_checkpoint(path).keys() == state.keys()
    assert {file.name for file in tmp_path.iterdir()} == {"a.pth", "b.pth"}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(state, make_settings, monkeypatch, tmp_path, share):
    path = _save(tmp_path / "a.pth", make_settings, monkeypatch, model=state)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4),
    zipped=st.booleans(),
)
def test_damage_is_never_anything_but_a_checkpoint_error(tmp_path_factory, changes, zipped):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    content = {"model": {"a": torch.ones(3, 2), "b": torch.zeros(4)}, "input": input, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    damaged = bytearray(path.read_bytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        assert read_checkpoint(path)


def test_missing_changed_and_unknown_keys_are_named(state):
    with pytest.raises(CheckpointError, match=r"stem.1.bias is missing"):
        convert_state({name: tensor for name, tensor in state.items() if name != "stem.1.bias"})
    with pytest.raises(CheckpointError, match=r"cls.classifier.0.weight is missing"):
        convert_state({name: tensor for name, tensor in state.items() if not name.startswith("cls")})
    with pytest.raises(CheckpointError, match="surprise is not in the network"):
        convert_state({**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"alpha1 has shape \(32,\), not \(1, 32, 1, 1\)"):
        convert_state({**state, "subnet1.alpha1": torch.zeros(32)})
    with pytest.raises(CheckpointError, match="2 columns, with widths and blocks of no known size"):
        convert_state({name: tensor for name, tensor in state.items() if not name.startswith("subnet2")})
    with pytest.raises(CheckpointError, match="is of kind revcol_classifier, not itpn_pixel_dense"):
        convert_state(state, kind="itpn_pixel_dense")
