"""Weights between stages: every key is reported, none is dropped silently, damaged files are named."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vitpipe.contracts.errors import CheckpointError, StorageError
from vitpipe.models import weights
from vitpipe.models.build import as_stored, build_classifier, build_dense, build_encoder, build_pretrainer
from vitpipe.models.hivit.config import PyramidConfig
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import (
    Rule,
    load_into,
    load_metadata,
    load_state,
    save_weights,
)


@pytest.fixture(scope="module")
def pretrained(nano, tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pretrain") / "weights.safetensors"
    model = build_pretrainer(nano).eval()
    save_weights(model, path, {"stage": "pretrain"})
    return model, path


@pytest.fixture(scope="module")
def classified(nano, tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("finetune") / "weights.safetensors"
    model = build_classifier(nano.model_copy(update={"head_init_std": 0.02}), num_classes=10).eval()
    with torch.no_grad():
        for block in model.backbone.stage16:
            block.attn.relative_table.normal_()
    save_weights(model, path)
    return model, path


def _of_depth(model, depth):
    """With a pyramid of this depth in dense tasks."""
    return model.model_copy(update={"pyramid": model.pyramid.model_copy(update={"dense_depth": depth})})


def _accounted(report, model, path):
    """Every key of the file and of the network has exactly one row, and the table has it too."""
    sources = [row.source for row in report.rows if row.source]
    targets = [row.target for row in report.rows if row.target]
    assert sorted(sources) == sorted(load_state(path))
    assert sorted(targets) == sorted(model.state_dict())
    assert len(report.table()) == len(report.rows)
    assert all(row.why for row in report.rows if row.outcome != "matched")


def test_saved_weights_load_unchanged(pretrained, nano):
    model, path = pretrained
    other = build_pretrainer(nano)
    report = load_into(other, load_state(path), where=path)
    assert report.count("matched") == len(report.rows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert load_metadata(path) == {"stage": "pretrain"}
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]


def test_describe_recognises_a_file(pretrained, classified, nano):
    info = describe(load_state(pretrained[1]))
    assert (info.kind, info.model, info.image_size) == ("pretrain", "hivit_nano", 64)
    assert info.num_classes == 0
    sizes = {"pyramid_width": 48, "pyramid_depth": 2}
    assert info.options == {"relative_position": False, "layer_scale": False, **sizes}
    assert not as_stored(nano, info).relative_position
    info = describe(load_state(classified[1]))
    assert (info.kind, info.num_classes) == ("classifier", 10)
    without = nano.model_copy(update={"relative_position": False})
    assert as_stored(without, info) == nano
    dense = build_dense(nano, "detect", image_size=64).state_dict()
    assert describe(dense).kind == "pyramid"


@torch.no_grad()
def test_pretraining_to_classifier(pretrained, nano):
    source, path = pretrained
    model = build_classifier(nano, num_classes=10).eval()
    report = transfer_weights(model, path)
    _accounted(report, model, path)
    missing = {row.target for row in report.rows if row.outcome == "missing"}
    tables = {f"backbone.stage16.{i}.attn.relative_table" for i in range(4)}
    assert missing == tables | {"head_norm.weight", "head_norm.bias", "head.weight", "head.bias"}
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        model.backbone.forward_stages(images).level16_BNC,
        source.backbone.forward_stages(images).level16_BNC,
        rtol=1e-4,
        atol=1e-5,
    )
    assert "a new head" in report.summary()


@torch.no_grad()
def test_pretraining_to_dense_features(pretrained, nano):
    source, path = pretrained
    model = build_dense(nano, "detect", image_size=64).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # as in pre-training: only the weights are compared here
    report = transfer_weights(model, path)
    _accounted(report, model, path)
    assert report.count("missing") == 0
    images = torch.randn(1, 3, 64, 64)
    levels = source.pyramid(source.backbone.forward_stages(images))
    features = model.features(images)
    torch.testing.assert_close(features.o16, levels.o16[:, :, 0, 0].transpose(1, 2).view(1, 48, 4, 4))


def test_a_shallower_pyramid_drops_the_second_blocks(pretrained, nano):
    _, path = pretrained
    model = build_dense(_of_depth(nano, 1), "detect", image_size=64)
    report = transfer_weights(model, path)
    _accounted(report, model, path)
    dropped = {row.source for row in report.rows if row.outcome == "unused" and "pyramid" in row.source}
    assert {name.rsplit(".", 2)[0].removesuffix(".mlp") for name in dropped} == {
        "pyramid.fuse8.1",
        "pyramid.fuse4.1",
    }


def test_a_deeper_pyramid_starts_its_second_blocks_afresh(nano, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(
        build_pretrainer(nano.model_copy(update={"pyramid": PyramidConfig(width=48, depth=1)})), path
    )
    model = build_dense(_of_depth(nano, 2), "detect", image_size=64)
    before = model.pyramid.fuse8[1].mlp.fc1.weight.clone()
    report = transfer_weights(model, path)
    _accounted(report, model, path)
    assert torch.equal(model.pyramid.fuse8[1].mlp.fc1.weight, before)
    fresh = {row.target for row in report.rows if row.outcome == "missing"}
    assert {name.split(".")[2] for name in fresh} == {"1"}


@torch.no_grad()
def test_an_encoder_takes_weights_and_gives_them(pretrained, classified, nano, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    for source, path in (pretrained, classified):
        model = build_encoder(as_stored(nano, describe(load_state(path)))).eval()
        report = transfer_weights(model, path)
        _accounted(report, model, path)
        assert report.count("missing") == 0
        tokens = source.backbone.forward_stages(images).level16_BNC
        assert torch.equal(model.features(images).tokens[0], tokens)
        assert torch.equal(model.frozen_features(images), tokens.mean(dim=1))
    save_weights(model, tmp_path / "encoder.safetensors")
    info = describe(load_state(tmp_path / "encoder.safetensors"))
    assert str(info) == "an encoder network of hivit_nano for 64 pixels"
    for other in (build_classifier(nano, num_classes=3), build_dense(nano, "segment", image_size=64)):
        report = transfer_weights(other, tmp_path / "encoder.safetensors")
        _accounted(report, other, tmp_path / "encoder.safetensors")
        assert report.count("unused") == 0


@pytest.mark.parametrize(("num_classes", "fresh"), [(10, 0), (7, 2)])
def test_classifier_to_classifier(classified, nano, num_classes, fresh):
    source, path = classified
    model = build_classifier(nano, num_classes=num_classes)
    report = transfer_weights(model, path)
    _accounted(report, model, path)
    assert report.count("fresh") == fresh
    assert torch.equal(model.head_norm.weight, source.head_norm.weight)
    table = model.backbone.stage16[3].attn.relative_table
    assert torch.equal(table, source.backbone.stage16[3].attn.relative_table)


def test_a_classifier_without_relative_positions_refuses_one_with(classified, nano):
    model = build_classifier(nano.model_copy(update={"relative_position": False}), num_classes=10)
    with pytest.raises(CheckpointError, match="relative_table of the file is not in the network"):
        transfer_weights(model, classified[1])


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_classifier_to_dense_features(classified, nano, task):
    model = build_dense(nano, task, image_size=128)
    report = transfer_weights(model, classified[1])
    _accounted(report, model, classified[1])
    assert report.count("resized") == (4 if task == "segment" else 0)
    assert all(row.target.startswith("pyramid.") for row in report.rows if row.outcome == "missing")


@torch.no_grad()
def test_resized_positions_equal_those_interpolated_on_the_way(pretrained, nano):
    """A table resized at loading and one resampled in the forward pass are the same function."""
    source, path = pretrained
    larger = build_classifier(
        nano.model_copy(update={"image_size": 96, "relative_position": False}), num_classes=3
    ).eval()
    report = transfer_weights(larger, path)
    resized = [row for row in report.rows if row.outcome == "resized"]
    assert [row.target for row in resized] == ["backbone.absolute_position"]
    assert "(1, 16, 64)" in resized[0].why
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(
        larger.backbone.forward_stages(images).level16_BNC,
        source.backbone.forward_stages(images).level16_BNC,
    )


def test_pretraining_weights_are_never_resized(pretrained, nano):
    model = build_pretrainer(nano.model_copy(update={"image_size": 96}))
    with pytest.raises(CheckpointError, match="absolute_position has shape"):
        transfer_weights(model, pretrained[1])


def test_weights_of_another_size_are_refused(classified):
    from vitpipe.config.model import model_config

    with torch.device("meta"):
        model = build_classifier(model_config({"name": "hivit_base", "image_size": 64}), num_classes=10)
    with pytest.raises(CheckpointError, match=r"stem.proj.weight has shape \(16, 3, 4, 4\)") as caught:
        transfer_weights(model, classified[1])
    assert "hivit_nano for 64 pixels" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_refused_file_leaves_the_network_alone(nano, pretrained):
    model = build_classifier(nano, num_classes=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"relative_table is not in the file.*96 more"):
        load_into(model, load_state(pretrained[1]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rules_allow_only_what_they_name():
    model = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "extra": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"bias is not in the file; extra of the file"):
        load_into(model, state)
    rules = [Rule("missing", "^bias$", "new"), Rule("unused", "^extra$", "old")]
    report = load_into(model, state, rules=rules)
    assert {(row.source, row.target): row.outcome for row in report.rows} == {
        ("weight", "weight"): "matched",
        ("", "bias"): "missing",
        ("extra", ""): "unused",
    }
    with pytest.raises(
        CheckpointError, match=r"weight has shape \(3, 2\) in the file, \(2, 2\) in the network"
    ):
        load_into(model, {"weight": torch.ones(3, 2)}, rules=rules)
    rules.append(Rule("fresh", "^weight$", "other"))
    assert load_into(model, {"weight": torch.ones(3, 2)}, rules=rules).count("fresh") == 1


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_a_truncated_file_is_named(pretrained, tmp_path, share):
    content = pretrained[1].read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_state(path)
    assert str(path) in str(caught.value)


def test_files_of_other_formats_and_missing_files_are_named(tmp_path, nano):
    torch.save({"model": {}}, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="vitpipe convert"):
        load_state(tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_state(tmp_path / "none.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match="of no vitpipe network"):
        transfer_weights(build_classifier(nano, num_classes=2), tmp_path / "resnet.safetensors")


def test_the_same_tensors_are_the_same_bytes_in_a_file_that_others_may_read(tmp_path):
    tensors = {
        "b": torch.arange(5.0),
        "a": torch.ones(2, 3, dtype=torch.int64),
        "c": torch.ones(1).bfloat16(),
    }
    metadata = {f"key {letter} \u00e9\n": "x" * 7 for letter in "zyxwvutsrq"}
    contents = set()
    umask = os.umask(0o027)
    try:
        for number in range(8):
            path = tmp_path / f"{number}.safetensors"
            save_weights(dict(reversed(tensors.items())) if number % 2 else tensors, path, metadata)
            contents.add(path.read_bytes())
            assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)
    assert len(contents) == 1
    assert load_metadata(path) == metadata
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_state(path).items())


def test_a_file_without_read_permission_is_not_reported_as_damaged(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(1)}, path)
    monkeypatch.setattr(os, "access", lambda *asked: False)  # root may read everything
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_state(path)
    assert "truncated" not in str(caught.value)


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def refuse(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("IoError: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", refuse)
    with pytest.raises(StorageError, match="free some space"):
        save_weights({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())
