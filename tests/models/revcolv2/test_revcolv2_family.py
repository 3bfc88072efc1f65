"""Transfer of RevColV2's weights between stages: loaded, newly initialised and refused keys."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.model import model_config
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.build import build_classifier, build_dense, build_encoder, build_pretrainer
from vitpipe.models.revcolv2.config import ColumnsConfig
from vitpipe.models.revcolv2.revcolv2 import resize_positions
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state, save_weights

NANO = model_config({"name": "revcolv2_nano", "image_size": 64})
LARGER = NANO.model_copy(update={"image_size": 96})
TABLES = {"backbone.pos_embed", "backbone.top_down_pos_embed"}
PIXEL_KEYS = {"mask_token", "pixel_norm.weight", "pixel_norm.bias", "pixel_head.weight", "pixel_head.bias"}
HEAD = {f"head.{part}.{kind}" for part in ("norm", "fc") for kind in ("weight", "bias")}


def _saved(model, path):
    """A trained network: nothing is at its start value, the tables no longer sine and cosine."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_weights(model, path)
    return model.eval(), path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return _saved(build_pretrainer(NANO), tmp_path_factory.mktemp("pretrain") / "weights.safetensors")


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    model = build_classifier(NANO, num_classes=10)
    return _saved(model, tmp_path_factory.mktemp("finetune") / "weights.safetensors")


def _transferred(model, path, **expected):
    """Every key has its row; rows of outcomes other than `matched` are those expected."""
    report = transfer_weights(model, path)
    assert sorted(row.source for row in report.rows if row.source) == sorted(load_state(path))
    assert sorted(row.target for row in report.rows if row.target) == sorted(model.state_dict())
    found = {}
    for row in report.rows:
        if row.outcome != "matched":
            assert row.why
            found.setdefault(row.outcome, set()).add(row.target or row.source)
    assert found == expected
    return model.eval()


def _same_backbone(first, second, size=64):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for ours, theirs in zip(first.backbone(images), second.backbone(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pretraining_to_itself(pretrained):
    model = _transferred(build_pretrainer(NANO), pretrained[1])
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    with torch.no_grad():
        assert torch.equal(model(images, noise).pred_BND, pretrained[0](images, noise).pred_BND)


def test_pretraining_to_classifier(pretrained):
    model = _transferred(
        build_classifier(NANO, num_classes=10), pretrained[1], missing=HEAD, unused=PIXEL_KEYS
    )
    _same_backbone(model, pretrained[0])
    assert model.backbone.pos_embed.requires_grad
    assert not pretrained[0].backbone.pos_embed.requires_grad


@pytest.mark.parametrize(("num_classes", "fresh"), [(10, set()), (7, {"head.fc.weight", "head.fc.bias"})])
def test_classifier_to_classifier(classified, num_classes, fresh):
    expected = {"fresh": fresh} if fresh else {}
    model = _transferred(build_classifier(NANO, num_classes=num_classes), classified[1], **expected)
    _same_backbone(model, classified[0])
    assert torch.equal(model.head.norm.weight, classified[0].head.norm.weight)


@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("image_size", [64, 128])
def test_to_dense_features(pretrained, classified, task, image_size):
    for source, path, unused in ((*pretrained, PIXEL_KEYS), (*classified, HEAD)):
        model = build_dense(NANO, task, image_size=image_size)
        neck = {name for name in model.state_dict() if not name.startswith("backbone.")}
        assert {name.split(".")[0] for name in neck} <= {"norms", "rescale", "refine"}
        expected = {"resized": TABLES} if image_size == 128 else {}
        model = _transferred(model, path, missing=neck, unused=unused, **expected)
        _same_backbone(model, source, image_size)


@torch.no_grad()
def test_positions_resized_at_loading_are_those_resized_on_the_way(pretrained):
    source, path = pretrained
    model = build_classifier(LARGER, num_classes=3)
    model = _transferred(model, path, missing=HEAD, unused=PIXEL_KEYS, resized=TABLES)
    for name in ("pos_embed", "top_down_pos_embed"):
        ours, given = getattr(model.backbone, name), getattr(source.backbone, name)
        torch.testing.assert_close(ours, resize_positions(given, (6, 6)))
    _same_backbone(model, source, 96)


def test_pretraining_weights_are_never_resized(pretrained):
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 16, 48\) in the file"):
        transfer_weights(build_pretrainer(LARGER), pretrained[1])


def test_describe_recognises_a_file(pretrained, classified):
    info = describe(load_state(pretrained[1]))
    assert (info.family, info.kind, info.image_size) == ("revcolv2", "pretrain", 64)
    assert info.model == "revcolv2_nano"
    info = describe(load_state(classified[1]))
    assert (info.kind, info.num_classes) == ("classifier", 10)
    dense = build_dense(NANO, "detect", image_size=128).state_dict()
    assert str(describe(dense)) == "a pyramid network of revcolv2_nano for 128 pixels"
    with torch.device("meta"):
        for name in ("revcolv2_base", "revcolv2_large"):
            assert (
                describe(build_classifier(model_config({"name": name}), num_classes=2).state_dict()).model
                == name
            )


def test_weights_that_do_not_fit_are_refused(pretrained, tmp_path):
    with torch.device("meta"):
        base = build_classifier(model_config({"name": "revcolv2_base", "image_size": 64}), num_classes=10)
    with pytest.raises(CheckpointError, match="the file holds a pretrain network of revcolv2_nano for 64"):
        transfer_weights(base, pretrained[1])
    more = NANO.model_copy(update={"columns": ColumnsConfig(top_down=3)})
    with pytest.raises(CheckpointError, match=r"top_down\.2\.gamma\.0 is not in the file"):
        transfer_weights(build_classifier(more, num_classes=10), pretrained[1])
    fewer = NANO.model_copy(update={"columns": ColumnsConfig(bottom_up=1)})
    with pytest.raises(CheckpointError, match=r"bottom_up\.1\.gamma\.0 of the file is not in the network"):
        transfer_weights(build_classifier(fewer, num_classes=10), pretrained[1])
    hivit = build_classifier(model_config({"name": "hivit_nano", "image_size": 64}), num_classes=10)
    save_weights(hivit, tmp_path / "hivit.safetensors")
    for network in (build_pretrainer(NANO), build_dense(NANO, "segment", image_size=64)):
        with pytest.raises(CheckpointError, match="hivit_nano for 64 pixels, which is no revcolv2") as caught:
            transfer_weights(network, tmp_path / "hivit.safetensors")
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "hivit.safetensors") in str(caught.value)
    with pytest.raises(CheckpointError, match="which is no hivit network"):
        transfer_weights(hivit, pretrained[1])


def test_the_recipes_columns_are_built():
    columns = ColumnsConfig(bottom_up=3, top_down=1, memory_mode="column", reversible_autocast=True)
    model = build_pretrainer(NANO.model_copy(update={"columns": columns}))
    assert (len(model.backbone.bottom_up), len(model.backbone.top_down)) == (3, 1)
    assert model.backbone.memory.requested == "column"
    assert model.backbone.memory.allow_reversible_amp
    one = ColumnsConfig(bottom_up=1)
    model = build_pretrainer(NANO.model_copy(update={"columns": one}))
    assert (len(model.backbone.bottom_up), len(model.backbone.top_down)) == (1, 2)


@pytest.mark.parametrize("kind", ["bottom_up", "top_down"])
def test_no_columns_at_all_are_refused_by_the_recipe(kind):
    with pytest.raises(RecipeError, match=rf"model\.columns\.{kind}.*greater than or equal to 1") as caught:
        load_recipe("revcolv2/base", "full", [f"model.columns.{kind}=0"])
    assert "\n" not in str(caught.value)


def test_foreign_settings_are_refused():
    for key in ("pyramid.width", "decoder.depth", "relative_position", "column", "columns.topdown"):
        with pytest.raises(RecipeError, match=rf"'model\.{key.partition('.')[0]}.*' is not a known key"):
            load_recipe("revcolv2/base", "full", [f"model.{key}=1"])
    with pytest.raises(RecipeError, match=r"'model\.column' is not a known key \(did you mean 'columns'"):
        load_recipe("revcolv2/base", "full", ["model.column=1"])
    with pytest.raises(RecipeError, match=r"'model\.pyramid' is not a known key(;|\.)"):
        load_recipe("revcolv2/base", "full", ["model.pyramid={}"])
    with pytest.raises(InputError, match="multiple of 16"):
        build_classifier(NANO.model_copy(update={"image_size": 72}), num_classes=2)


def test_an_encoder_takes_weights_and_gives_them(pretrained, classified, tmp_path):
    top_down = "backbone.top_down"
    for source, path, unused in ((*pretrained, PIXEL_KEYS), (*classified, HEAD)):
        model = _transferred(build_encoder(NANO), path, unused=unused)
        _same_backbone(model, source)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith(top_down))
    save_weights(model, tmp_path / "encoder.safetensors")
    assert str(describe(load_state(tmp_path / "encoder.safetensors"))).startswith("an encoder network of")
    classifier = build_classifier(NANO, num_classes=10)
    _same_backbone(_transferred(classifier, tmp_path / "encoder.safetensors", missing=HEAD), model)
    dense = build_dense(NANO, "segment", image_size=64)
    neck = {name for name in dense.state_dict() if not name.startswith("backbone.")}
    _transferred(dense, tmp_path / "encoder.safetensors", missing=neck)
