"""Conversion of Swin checkpoints: MoBY's, released classifiers, timm's; every key accounted for."""

from __future__ import annotations

import json
import re

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.convert import convert, convert_state
from vitpipe.models.swin.shapes import SHAPES
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import load_into, load_metadata

NANO = model_config({"name": "swin_nano"})


def _timms(image_size=64, num_classes=10, **changes):
    """timm's classifier with the sizes of our smallest network."""
    torch.manual_seed(5)
    shape = SHAPES["swin_nano"]
    sizes = {"embed_dim": shape.width, "depths": shape.depths, "num_heads": shape.heads, "window_size": 4}
    return SwinTransformer(img_size=image_size, num_classes=num_classes, **{**sizes, **changes}).eval()


def _as_released(timms):
    """The state under the names of the released code: merges one stage earlier, buffers, a plain head."""
    state = {}
    for name, tensor in timms.state_dict().items():
        moved = re.sub(r"layers\.(\d)\.down", lambda found: f"layers.{int(found[1]) - 1}.down", name)
        state[moved.replace("head.fc.", "head.")] = tensor
    for name, buffer in timms.named_buffers():
        state[name] = buffer
    return state


def _meta(golden, name):
    shapes = json.loads((golden.folder / "keys" / f"{name}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_key_of_a_moby_checkpoint_has_its_row(golden):
    official = _meta(golden, "moby_swin_tiny")
    found = convert_state(official)
    assert (found.kind, found.model) == ("moby_swin", "swin_tiny")
    assert [row.source for row in found.report.rows] == list(official)
    assert sum(tensor.numel() for tensor in found.state.values()) == 27_519_354
    why = {row.source: row.why for row in found.report.rows if row.outcome == "dropped"}
    kept = {row.source: row.target for row in found.report.rows if row.outcome == "renamed"}
    # What MoBY's linear probe keeps, buffers aside.
    assert set(kept) == {
        key
        for key in official
        if "encoder." in key and not key.endswith(("attn_mask", "relative_position_index"))
    }
    assert kept["encoder.layers.0.downsample.reduction.weight"] == (
        "backbone.layers.1.downsample.reduction.weight"
    )
    for key, reason in (
        ("encoder_k.norm.weight", "target encoder"),
        ("encoder_k.layers.0.blocks.1.attn_mask", "target encoder"),
        ("projector.linear_out.bias", "projection head"),
        ("projector_k.linear_hidden.2.running_mean", "projection head of the target"),
        ("predictor.linear_hidden.2.num_batches_tracked", "prediction head"),
        ("queue1", "keys of earlier images"),
        ("queue_ptr", "keys of earlier images"),
        ("encoder.layers.0.blocks.1.attn_mask", "a mask that the network computes"),
        ("encoder.layers.3.blocks.0.attn.relative_position_index", "an index that the network computes"),
    ):
        assert reason in why[key], key
    assert not any(reason == "" for reason in why.values())


def test_a_released_classifier_with_and_without_drlocs_part(golden):
    official = _meta(golden, "drloc_swin_tiny")
    found = convert_state(official)
    assert (found.kind, found.model) == ("swin_classifier", "swin_tiny")
    assert [row.source for row in found.report.rows] == list(official)
    dropped = {row.source.split(".")[0 if row.source.startswith("drloc") else -1]
               for row in found.report.rows if row.outcome == "dropped"}  # fmt: skip
    assert dropped == {"drloc", "attn_mask", "relative_position_index"}
    plain = {key: tensor for key, tensor in official.items() if not key.startswith("drloc.")}
    assert convert_state(plain).state.keys() == found.state.keys()
    headless = {key: tensor for key, tensor in plain.items() if not key.startswith("head.")}
    assert convert_state(headless).kind == "swin_encoder"


@pytest.mark.parametrize(("image_size", "window"), [(64, 4), (64, 8), (128, 4), (32, 4)])
@pytest.mark.parametrize("layout", ["timm", "released", "released, before the buffers were dropped"])
@torch.no_grad()
def test_the_same_logits_from_timms_and_from_released_names(image_size, window, layout):
    timms = _timms(image_size, window_size=window)
    state = timms.state_dict() if layout == "timm" else _as_released(timms)
    if layout == "released":
        state = {name: tensor for name, tensor in state.items() if "attn_mask" not in name}
    found = convert_state(state)
    assert (found.kind, found.model) == ("swin_classifier", "swin_nano")
    assert {row.outcome for row in found.report.rows} <= {"renamed", "dropped"}
    config = NANO.model_copy(update={"image_size": image_size, "window": window})
    ours = build_classifier(config, num_classes=10).eval()
    load_into(ours, found.state)
    images = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(ours(images), timms(images))


def test_a_moby_file_as_released(tmp_path):
    encoder = {
        name: tensor for name, tensor in _as_released(_timms()).items() if not name.startswith("head.")
    }
    state = {
        "queue1": torch.zeros(8, 16),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "projector.linear_out.bias": torch.zeros(3),
        **{f"encoder.{name}": tensor for name, tensor in encoder.items()},
        **{f"encoder_k.{name}": tensor + 1 for name, tensor in encoder.items()},
    }
    torch.save({"model": state, "epoch": 299, "max_accuracy": 0.0}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "a.safetensors", kind="moby_swin")
    assert [row.source for row in report.rows] == list(state)
    assert load_metadata(tmp_path / "a.safetensors")["model"] == "swin_nano"
    ours = build_encoder(NANO)
    report = transfer_weights(ours, tmp_path / "a.safetensors")
    assert report.count("matched") == len(report.rows) == len(ours.state_dict())
    assert torch.equal(ours.backbone.norm.bias, encoder["norm.bias"])
    report = transfer_weights(build_classifier(NANO, num_classes=3), tmp_path / "a.safetensors")
    assert report.count("missing") == 2


def test_missing_changed_and_unknown_keys_are_named():
    state = _as_released(_timms())
    with pytest.raises(CheckpointError, match=r"backbone\.norm\.bias is missing"):
        convert_state({key: tensor for key, tensor in state.items() if key != "norm.bias"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.downsample\.norm\.bias is missing"):
        convert_state({k: tensor for k, tensor in state.items() if k != "layers.2.downsample.norm.bias"})
    with pytest.raises(CheckpointError, match=r"surprise is not known"):
        convert_state({**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"layers\.1\.surprise is not in the network"):
        convert_state({**state, "layers.1.surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"norm\.bias has shape \(7,\), not \(128,\)"):
        convert_state({**state, "norm.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"cannot be parameters: head\.weight \(\) of float32"):
        convert_state({**state, "head.weight": torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match="is of kind swin_classifier, not moby_swin"):
        convert_state(state, kind="moby_swin")
    moby = {f"encoder.{key}": tensor for key, tensor in state.items() if not key.startswith("head.")}
    with pytest.raises(CheckpointError, match="surprise is not known"):
        convert_state({**moby, "queue": torch.zeros(2), "surprise": torch.zeros(1)})


def test_networks_of_other_sizes_are_refused():
    deeper = _timms(depths=(2, 2, 4, 1)).state_dict()
    with pytest.raises(CheckpointError, match="2-2-4-1 blocks and 16 channels, which is no known size"):
        convert_state(deeper)
    with pytest.raises(CheckpointError, match="no known size"):
        convert_state(_timms(num_heads=(2, 2, 4, 8)).state_dict())
    # S3 networks have another window in one stage.
    with pytest.raises(CheckpointError, match=r"layers\.2.*relative_position_bias_table has shape"):
        convert_state(_timms(128, window_size=(4, 4, 8, 4)).state_dict())
    with pytest.raises(CheckpointError, match=r"windows of 4 and 3 tokens fit no image"):
        convert_state(_timms(96).state_dict())
