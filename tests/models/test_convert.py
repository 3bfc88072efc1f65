"""Conversion of official checkpoints: kinds found from keys, every key reported, damaged files named."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer
from vitpipe.models.convert import convert, convert_state, read_checkpoint
from vitpipe.models.hivit.conversion import our_name
from vitpipe.models.hivit.hivit import SHAPES
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import load_into, load_metadata, load_state

KINDS = {
    "pixel_base_pretrain": "itpn_pixel_pretrain",
    "pixel_large_pretrain": "itpn_pixel_pretrain",
    "pixel_base_classifier": "itpn_pixel_classifier",
    "pixel_large_classifier": "itpn_pixel_classifier",
    "det_pixel_base": "itpn_pixel_dense",
    "det_pixel_large": "itpn_pixel_dense",
    "seg_pixel_base": "itpn_pixel_dense",
    "seg_pixel_large": "itpn_pixel_dense",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_official_network_is_known(golden, name):
    official = golden.empty_state(name)
    converted = convert_state(official)
    assert converted.kind == KINDS[name]
    assert converted.model == ("hivit_base" if "base" in name else "hivit_large")
    assert sorted(row.source for row in converted.report.rows) == sorted(official)
    dropped = [row.source for row in converted.report.rows if row.outcome == "dropped"]
    assert dropped == [key for key in official if key == "relative_position_index"]
    assert len(converted.state) == len(official) - len(dropped)
    trainable = sum(t.numel() for n, t in converted.state.items() if n != "decoder.fixed_position")
    assert trainable == golden.keys(name)["params"]


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


def test_a_pretraining_file(official_nano, nano, tmp_path):
    state = official_nano["pixel_base_pretrain"]
    arguments = argparse.Namespace(model="itpn", lr=1.5e-4)
    torch.save(
        {"model": state, "optimizer": {"step": 3}, "epoch": 1599, "args": arguments}, tmp_path / "a.pth"
    )
    report = convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert report.count("renamed") == len(state)
    metadata = load_metadata(tmp_path / "a.safetensors")
    assert metadata["kind"] == "itpn_pixel_pretrain"
    assert metadata["model"] == "hivit_nano"
    assert metadata["source_sha256"] == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    load_into(build_pretrainer(nano), load_state(tmp_path / "a.safetensors"))
    model = build_classifier(nano, num_classes=10)
    transfer_weights(model, tmp_path / "a.safetensors")
    assert torch.equal(model.backbone.stem.proj.weight, state["patch_embed.proj.weight"])
    assert torch.equal(model.backbone.stage16[3].mlp.fc2.bias, state["blocks.7.mlp.fc2.bias"])


def test_a_classifier_file_under_module(official_nano, nano, tmp_path):
    state = {**official_nano["pixel_base_classifier"], "relative_position_index": torch.zeros(16, 16)}
    torch.save({"module": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "a.safetensors", kind="itpn_pixel_classifier")
    assert [row.source for row in report.rows if row.outcome == "dropped"] == ["relative_position_index"]
    load_into(build_classifier(nano, num_classes=10), load_state(tmp_path / "a.safetensors"))


def test_a_segmentor_file_with_heads(official_nano, nano, tmp_path):
    backbone = {f"backbone.{k}": v for k, v in official_nano["seg_pixel_base"].items()}
    heads = {"decode_head.conv_seg.weight": torch.zeros(150, 768, 1, 1)}
    torch.save({"state_dict": {**backbone, **heads}, "meta": {"iter": 160000}}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert [row.source for row in report.rows if row.outcome == "dropped"] == list(heads)
    model = build_dense(nano, "segment", image_size=128)
    assert transfer_weights(model, tmp_path / "a.safetensors").count("matched") == len(backbone)


def test_bare_and_safetensors_files(official_nano, tmp_path):
    from safetensors.torch import save_file

    state = official_nano["pixel_base_pretrain"]
    torch.save(state, tmp_path / "bare.pth")
    save_file(state, tmp_path / "bare.safetensors")
    first, second = (read_checkpoint(tmp_path / f"bare{suffix}") for suffix in (".pth", ".safetensors"))
    assert list(first) == list(state)
    assert first.keys() == second.keys()


def test_missing_changed_and_unknown_keys_are_named(official_nano):
    state = official_nano["pixel_base_pretrain"]
    with pytest.raises(CheckpointError, match=r"pyramid.lateral4.weight is missing"):
        convert_state({k: v for k, v in state.items() if k != "align_dim_8to4.weight"})
    with pytest.raises(CheckpointError, match=r"stage4.0.mlp.fc3.weight is not in the network"):
        convert_state({**state, "blocks.0.mlp.fc3.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="surprise is not known"):
        convert_state({**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"decoder.norm.bias has shape \(7,\), not \(64,\)"):
        convert_state({**state, "decoder_norm.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match="is of kind itpn_pixel_pretrain, not itpn_pixel_dense"):
        convert_state(state, kind="itpn_pixel_dense")
    with pytest.raises(CheckpointError, match="no known size"):
        convert_state({k: v for k, v in state.items() if not k.startswith("blocks.7.")})


def test_other_networks_are_refused(official_nano):
    state = official_nano["pixel_base_classifier"]
    with pytest.raises(CheckpointError, match="CLIP-supervised"):
        convert_state({**state, "blocks.0.gamma_2": torch.zeros(16)})
    with pytest.raises(CheckpointError, match=r"no known kind \(first keys: conv1.weight, fc.weight\)"):
        convert_state({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})


class _Evil:
    """An object of a malicious file: restoring it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "extra": _Evil(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="only running code could restore"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(official_nano, tmp_path, share):
    torch.save({"model": official_nano["pixel_base_pretrain"]}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        convert(tmp_path / "a.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_files_without_weights_are_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "c.pth")
