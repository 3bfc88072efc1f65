"""Conversion of official checkpoints: kinds found from keys, every key reported, damaged files named."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from vitpipe.contracts.errors import CheckpointError, StorageError
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer
from vitpipe.models.convert import convert, convert_state, read_checkpoint
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
    "clip_base_pretrain_512": "itpn_clip_pretrain",
    "clip_base_pretrain_768": "itpn_clip_pretrain",
    "clip_large_pretrain_512": "itpn_clip_pretrain",
    "clip_large_pretrain_768": "itpn_clip_pretrain",
    "clip_large256_pretrain_768": "itpn_clip_pretrain",
    "clip_base_classifier": "itpn_clip_classifier",
    "clip_large_classifier": "itpn_clip_classifier",
    "det_clip_base": "itpn_clip_dense",
    "det_clip_large": "itpn_clip_dense",
    "seg_clip_base": "itpn_clip_dense",
    "seg_clip_large": "itpn_clip_dense",
    "teacher_b16": "clip_image_tower",
    "teacher_l14": "clip_image_tower",
}
MODELS = {"base": "hivit_base", "large": "hivit_large", "b16": "clip_b16", "l14": "clip_l14"}


@pytest.mark.parametrize("name", KINDS)
def test_every_official_network_is_known(golden, name):
    official = golden.empty_state(name)
    converted = convert_state(official)
    assert converted.kind == KINDS[name]
    assert converted.model == next(model for size, model in MODELS.items() if size in name)
    assert sorted(row.source for row in converted.report.rows) == sorted(official)
    dropped = [row.source for row in converted.report.rows if row.outcome == "dropped"]
    assert dropped == [key for key in official if key == "relative_position_index"]
    assert len(converted.state) == len(official) - len(dropped)
    trainable = sum(t.numel() for n, t in converted.state.items() if n != "decoder.fixed_position")
    assert trainable == golden.keys(name)["params"]


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
    for other in (
        {"blocks.4.attn.q_bias": torch.zeros(64)},
        {"blocks.4.mlp.w1.weight": torch.zeros(256, 64)},
        {"pos_embed": torch.zeros(1, 16, 64)},
        {"blocks.1.reduction.weight": torch.zeros(32, 16, 2, 2)},
    ):
        with pytest.raises(CheckpointError, match="is of Fast-iTPN, a later network"):
            convert_state({**state, **other})
    # One vector alone makes no network of CLIP's supervision.
    with pytest.raises(CheckpointError, match="gamma_2 is missing"):
        convert_state({**state, "blocks.0.gamma_2": torch.zeros(16)})
    with pytest.raises(CheckpointError, match=r"no known kind \(first keys: conv1.weight, fc.weight\)"):
        convert_state({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(official_nano, tmp_path, share):
    torch.save({"model": official_nano["pixel_base_pretrain"]}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        convert(tmp_path / "a.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_flipped_bit_is_found(official_nano, tmp_path):
    torch.save({"model": official_nano["pixel_base_pretrain"]}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
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


def converted(content, folder, **options) -> dict[str, torch.Tensor]:
    """What `convert` writes of a file with this content, into a folder that does not exist yet."""
    torch.save(content, folder / "a.pth", **options)
    convert(folder / "a.pth", folder / "new" / "folder" / "x.safetensors")
    return load_state(folder / "new" / "folder" / "x.safetensors")


def with_prefix(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


class _History:
    """As mmengine's HistoryBuffer: an object with attributes, arrays among them."""

    def __init__(self) -> None:
        self.values, self.counts = np.ones(3), [1, 2]


class _Settings(dict):
    """As mmengine's and yacs's: a dict with attributes."""


class _Scores(list):
    """A list with items that pickle appends."""


BESIDE = {
    "namespace": argparse.Namespace(lr=1e-3, output_dir=Path("x")),
    "numpy scalars": {"max_accuracy": np.float64(83.2), "epoch": np.int64(3), "name": np.str_("a")},
    "history": {"train/loss": _History()},
    "settings": _Settings(model=_Settings(depth=3)),
    "lists": [_Scores([1.0, 2.0]), {Path("a"), Path("b")}, collections.deque([1]), collections.Counter("ab")],
    "a path as key": {Path("a"): 1, ("b", 2): datetime.timedelta(1)},
    "classes and functions": [nn.GELU, functools.partial(max, 1), torch.float16, torch.Size([2])],
    "optimiser": torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).state_dict(),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_weights_is_no_obstacle(official_nano, tmp_path, name, zipped):
    state = official_nano["pixel_base_classifier"]
    plain = convert_state(state).state
    found = converted(
        {"extra": BESIDE[name], "model": state, "more": BESIDE[name]},
        tmp_path,
        _use_new_zipfile_serialization=zipped,
    )
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "encoder.",
        "backbone.",
        "module._orig_mod.model.",
        "teacher.backbone.",
        "net.module.",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_in_any_nesting_are_taken_off(official_nano, tmp_path, prefix, suffix):
    state = official_nano["pixel_base_classifier"]
    file = tmp_path / f"a{suffix}"
    content = {**with_prefix(prefix, state), "optimizer_step": torch.tensor(3)}
    if prefix.rstrip(".").rpartition(".")[2] in ("module", "_orig_mod"):
        content.pop("optimizer_step")  # then the network is the whole file, and has nothing of that name
    save_file(content, file) if suffix == ".safetensors" else torch.save({"model": content}, file)
    report = convert(file, tmp_path / "x.safetensors")
    assert load_state(tmp_path / "x.safetensors").keys() == convert_state(state).state.keys()
    # Every name of the file has its row, what is dropped, too.
    assert len(report.rows) == len(content)


def test_of_several_entries_the_choice_is_said_and_can_be_made(official_nano, tmp_path):
    state = official_nano["pixel_base_classifier"]
    averaged = {name: tensor * 2 for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": averaged, "epoch": 3}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "x.safetensors")
    assert report.note == "Took the entry 'model'; --entry chooses another: model_ema"
    assert load_metadata(tmp_path / "x.safetensors")["entry"] == "model"
    convert(tmp_path / "a.pth", tmp_path / "y.safetensors", entry="model_ema")
    one, two = (load_state(tmp_path / name) for name in ("x.safetensors", "y.safetensors"))
    assert all(torch.equal(2 * one[name], two[name]) for name in one)
    with pytest.raises(CheckpointError, match="no weights in its entry teacher") as refused:
        convert(tmp_path / "a.pth", tmp_path / "z.safetensors", entry="teacher")
    assert "model, model_ema" in refused.value.fix
    torch.save(
        {"student": with_prefix("module.backbone.", state), "teacher": with_prefix("backbone.", averaged)},
        tmp_path / "b.pth",
    )
    assert convert(tmp_path / "b.pth", tmp_path / "t.safetensors").note.startswith("Took the entry 'teacher'")
    assert torch.equal(load_state(tmp_path / "t.safetensors")["head.weight"], averaged["head.weight"])


def test_a_classifier_with_its_head_beside_the_backbone(official_nano, tmp_path):
    state = official_nano["pixel_base_classifier"]
    body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    head = {
        f"head.fc.{name.removeprefix('head.')}": t for name, t in state.items() if name.startswith("head.")
    }
    found = converted({"state_dict": {**with_prefix("backbone.", body), **head}}, tmp_path)
    assert torch.equal(found["head.weight"], state["head.weight"])


def test_a_pickle_of_arrays(official_nano, tmp_path):
    state = official_nano["pixel_base_classifier"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {name: t.numpy() for name, t in state.items()}}))
    convert(tmp_path / "a.pkl", tmp_path / "x.safetensors")
    assert torch.equal(load_state(tmp_path / "x.safetensors")["head.weight"], state["head.weight"])


def test_a_scalar_and_a_whole_network_are_no_weights(tmp_path):
    torch.save(torch.tensor(3.0), tmp_path / "scalar.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "scalar.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(CheckpointError, match=r"whole object \(torch.nn.modules.linear.Linear\)"):
        read_checkpoint(tmp_path / "network.pth")


def test_a_refused_write_is_one_paragraph(official_nano, tmp_path, monkeypatch):
    torch.save({"model": official_nano["pixel_base_classifier"]}, tmp_path / "a.pth")
    (tmp_path / "file").write_text("")
    from vitpipe.models import weights

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        convert(tmp_path / "a.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


ODD_TENSORS = {
    "sparse": torch.eye(2).to_sparse(),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "meta": torch.zeros(2, device="meta"),
    "quantised": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    "big-endian": np.ones(3, ">f4"),
    "long floats": np.ones(3, np.longdouble),
    "objects": np.array([None, "a"], object),
    "a structure": np.zeros(2, [("a", "f4")]),
    "empty": torch.zeros(0),
    "strings": np.array(["a"]),
}


@pytest.mark.filterwarnings("ignore:Sparse|.*sparse")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_odd_tensors_among_the_weights_are_a_checkpoint_error_at_most(official_nano, tmp_path, name):
    state = official_nano["pixel_base_classifier"]
    torch.save({"model": {**state, "head.bias": ODD_TENSORS[name]}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        convert(tmp_path / "a.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
