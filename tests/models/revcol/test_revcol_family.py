"""RevCol from a recipe: settings, unsupported stages, transfer of weights."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.recipe import ColumnsConfig, ModelConfig, PyramidConfig
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer, create_backbone
from vitpipe.models.registry import MODELS
from vitpipe.models.revcol.family import FAMILY, shape_of
from vitpipe.models.revcol.revcol import SHAPES, RevCol
from vitpipe.models.transfer import describe, load_same, transfer_weights
from vitpipe.models.weights import load_state, save_weights

MICRO = ModelConfig(name="revcol_micro", image_size=64)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("finetune") / "weights.safetensors"
    model = build_classifier(MICRO, num_classes=10, head_init_std=0.02).eval()
    save_weights(model, path)
    return model, path


@pytest.mark.parametrize("mode", ["auto", "plain", "column", "reversible"])
def test_the_recipes_settings_are_used(mode):
    columns = ColumnsConfig(memory_mode=mode, reversible_autocast=mode == "reversible")
    model = build_classifier(
        MICRO.model_copy(update={"columns": columns}), num_classes=3, drop_path=0.4, head_init_std=0.5
    )
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
    assert MODELS[name].family == "revcol"
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
        RecipeError, match=r"revcol_micro has no masked pre-training.*choose a revcolv2 model"
    ):
        build_pretrainer(MICRO)
    for task in ("detect", "segment"):
        with pytest.raises(RecipeError, match=f"revcol_micro can only classify.*stages: {task}.*or revcolv2"):
            build_dense(MICRO, task, image_size=64)
    with pytest.raises(RecipeError, match="revcol_micro has no pyramid"):
        build_classifier(MICRO.model_copy(update={"pyramid": PyramidConfig()}), num_classes=2)
    with pytest.raises(RecipeError, match="no relative positions"):
        build_classifier(MICRO, num_classes=2, relative_position=True)
    columns = ColumnsConfig(bottom_up=4, memory_mode="plain")
    with pytest.raises(RecipeError, match=r"always has 3 columns.*Where: model\.columns\.bottom_up\."):
        build_classifier(MICRO.model_copy(update={"columns": columns}), num_classes=2)
    with pytest.raises(InputError, match=r"32, which does not divide 80 pixels.*multiple of 32"):
        build_classifier(MICRO.model_copy(update={"image_size": 80}), num_classes=2)
    with pytest.raises(InputError, match="multiple of 32"):
        create_backbone("revcol_micro", image_size=72)
    with pytest.raises(ValueError, match="no position tables"):
        FAMILY.resized("pos_embed", torch.zeros(1), torch.zeros(1))


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


def test_weights_that_do_not_fit_are_refused(classified, tmp_path):
    source, path = classified
    others = {
        "hivit": ModelConfig(name="hivit_nano", image_size=64),
        "revcolv2": ModelConfig(name="revcolv2_nano", image_size=64),
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
        tiny = build_classifier(ModelConfig(name="revcol_tiny"), num_classes=10)
    with pytest.raises(CheckpointError, match="the file holds a classifier network of revcol_micro"):
        transfer_weights(tiny, path)
    with pytest.raises(CheckpointError, match=r"classifier.1.weight has shape \(10, 128\) in the file"):
        load_same(build_classifier(MICRO, num_classes=7), load_state(path))
