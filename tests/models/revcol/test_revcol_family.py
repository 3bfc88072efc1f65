"""RevCol from a recipe: settings, unsupported stages, transfer of weights."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.model import entries, model_config
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.build import (
    build_classifier,
    build_dense,
    build_encoder,
    build_pretrainer,
    create_backbone,
)
from vitpipe.models.revcol.config import ReversibleConfig
from vitpipe.models.revcol.family import FAMILY, shape_of
from vitpipe.models.revcol.revcol import SHAPES, RevCol
from vitpipe.models.transfer import describe, load_same, transfer_weights
from vitpipe.models.weights import load_state, save_weights

MICRO = model_config({"name": "revcol_micro", "image_size": 64})


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("finetune") / "weights.safetensors"
    model = build_classifier(MICRO.model_copy(update={"head_init_std": 0.02}), num_classes=10).eval()
    save_weights(model, path)
    return model, path


@pytest.mark.parametrize("mode", ["auto", "plain", "column", "reversible"])
def test_the_recipes_settings_are_used(mode):
    columns = ReversibleConfig(memory_mode=mode, reversible_autocast=mode == "reversible")
    config = MICRO.model_copy(update={"columns": columns, "head_init_std": 0.5})
    model = build_classifier(config, num_classes=3, drop_path=0.4)
    assert model.memory.requested == mode
    assert model.memory.allow_reversible_amp == (mode == "reversible")
    for column in model.columns:
        ratios = [block.drop_ratio for level in range(4) for block in column.level(level).blocks]
        assert ratios == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.cls.classifier[1].weight.std().item() == pytest.approx(0.5, rel=0.2)
    model.eval()
    prepared = model.memory.prepare(model.columns, torch.device("cpu"), training=False)
    assert prepared == ("reversible" if mode == "auto" else mode)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    dead = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not dead


@pytest.mark.parametrize("name", SHAPES)
def test_every_size_is_registered_and_recognised(name):
    assert entries()[name].family == "revcol"
    with torch.device("meta"):
        state = RevCol(SHAPES[name], 5).state_dict()
    info = describe(state)
    assert (info.family, info.kind, info.model, info.num_classes) == ("revcol", "classifier", name, 5)
    assert str(info) == f"a classifier network of {name}"
    assert shape_of(state) is SHAPES[name]
    without = {key: tensor for key, tensor in state.items() if not key.startswith("subnet1.level3.fusion")}
    assert shape_of(without) is SHAPES[name]
    without = {key: tensor for key, tensor in state.items() if not key.startswith("subnet0.level2.blocks.0.")}
    assert shape_of(without) is None
    assert describe(without).model == ""


def test_unsupported_stages_and_settings_are_refused():
    with pytest.raises(
        RecipeError, match=r"revcol_micro has no masked.*of the family hivit or itpn_vit or revcolv2"
    ):
        build_pretrainer(MICRO)
    for task in ("detect", "segment"):
        with pytest.raises(
            RecipeError, match=r"neither detection nor segmentation.*hivit or itpn_vit or paca or revcolv2"
        ):
            build_dense(MICRO, task, image_size=64)
    wrong = ["model.pyramid={}", "model.relative_position=true", "model.columns.bottom_up=4"]
    with pytest.raises(RecipeError) as caught:
        load_recipe("revcolv2/base", "full", ["model.name=revcol_tiny", *wrong])
    for key in ("pyramid", "relative_position", "columns.bottom_up"):
        assert f"'model.{key}' is not a known key" in str(caught.value)
    with pytest.raises(InputError, match=r"32, which does not divide 80 pixels.*multiple of 32"):
        build_classifier(MICRO.model_copy(update={"image_size": 80}), num_classes=2)
    with pytest.raises(InputError, match="multiple of 32"):
        create_backbone("revcol_micro", image_size=72)
    with pytest.raises(ValueError, match="no rule that resizes"):
        FAMILY.resized(None, "pos_embed", torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(("num_classes", "num_fresh"), [(10, 0), (7, 2)])
def test_classifier_to_classifier(classified, num_classes, num_fresh):
    source, path = classified
    model = build_classifier(MICRO.model_copy(update={"image_size": 128}), num_classes=num_classes)
    before = model.cls.classifier[1].weight.clone()
    report = transfer_weights(model, path)
    assert sorted(row.target for row in report.rows) == sorted(model.state_dict())
    assert sorted(row.source for row in report.rows) == sorted(load_state(path))
    assert report.count("fresh") == num_fresh
    assert report.count("matched") == len(report.rows) - num_fresh
    assert torch.equal(model.cls.classifier[1].weight, before) == bool(num_fresh)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval().frozen_features(images), source.frozen_features(images))


def test_an_encoder_takes_weights_and_gives_them(classified, tmp_path):
    source, path = classified
    encoder = build_encoder(MICRO).eval()
    report = transfer_weights(encoder, path)
    assert {row.source for row in report.rows if row.outcome == "unused"} == {
        f"cls.classifier.{part}.{kind}" for part in (0, 1) for kind in ("weight", "bias")
    }
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found, whole = encoder.features(images, blocks=(0, 1, 2, 3)), source.forward_features(images)
        assert torch.equal(source.logits(whole), source(images))
        levels = source.run_columns(images, [3])[-1]
    assert found.grids == ((16, 24), (8, 12), (4, 6), (2, 3))
    for level, map_BCHW in zip(levels, found.maps(), strict=True):
        assert torch.equal(level, map_BCHW)
    assert torch.equal(found.pooled, whole.pooled)
    with pytest.raises(InputError, match=r"no block 4.*from 0 to 3"):
        encoder.features(images, blocks=(4,))
    save_weights(encoder, tmp_path / "encoder.safetensors")
    info = describe(load_state(tmp_path / "encoder.safetensors"))
    assert str(info) == "an encoder network of revcol_micro"
    report = transfer_weights(build_classifier(MICRO, num_classes=3), tmp_path / "encoder.safetensors")
    assert report.count("missing") == 4


def test_weights_that_do_not_fit_are_refused(classified, tmp_path):
    source, path = classified
    others = {
        "hivit": model_config({"name": "hivit_nano", "image_size": 64}),
        "revcolv2": model_config({"name": "revcolv2_nano", "image_size": 64}),
    }
    for family, config in others.items():
        other = build_classifier(config, num_classes=10)
        with pytest.raises(
            CheckpointError, match=f"a classifier network of revcol_micro, which is no {family}"
        ):
            transfer_weights(other, path)
        save_weights(other, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="which is no revcol network") as caught:
            transfer_weights(source, tmp_path / "other.safetensors")
        assert "\n" not in str(caught.value)
    with torch.device("meta"):
        tiny = build_classifier(model_config({"name": "revcol_tiny"}), num_classes=10)
    with pytest.raises(CheckpointError, match="the file holds a classifier network of revcol_micro"):
        transfer_weights(tiny, path)
    with pytest.raises(CheckpointError, match=r"classifier.1.weight has shape \(10, 128\) in the file"):
        load_same(build_classifier(MICRO, num_classes=7), load_state(path))
