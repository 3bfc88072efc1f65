"""What must hold for every network that can be built, whatever its size."""

from __future__ import annotations

import hashlib

import pytest
import torch

from vitpipe.config.recipe import ModelConfig
from vitpipe.evaluate.cost import measure_cost
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer, create_backbone
from vitpipe.models.registry import MODELS

SMALL_DECODER = {"pyramid": {"width": 64}, "decoder": {"width": 64, "depth": 2, "heads": 4}}
CONFIGS = {
    name: ModelConfig(
        name=name, image_size=entry.image_size, **(SMALL_DECODER if name == "hivit_nano" else {})
    )
    for name, entry in MODELS.items()
}


def _crop_size(model):
    return 512 if model.image_size == 224 else 128


BUILDERS = {
    "classifier": lambda model: build_classifier(model, num_classes=1000),
    "pretrainer": build_pretrainer,
    "detector": lambda model: build_dense(model, "detect", image_size=model.image_size, pyramid_depth=1),
    "segmentor": lambda model: build_dense(model, "segment", image_size=_crop_size(model)),
}
# name/network: parameters, multiply-adds, SHA-256 of the sorted "name shape" lines of the state (first 12)
PINNED = {
    "hivit_nano/classifier": (286_280, 4_585_984, "6781bcd1aac4"),
    "hivit_nano/pretrainer": (644_900, 12_148_736, "034e4931515c"),
    "hivit_nano/detector": (422_544, 27_721_728, "b97e72de89d8"),
    "hivit_nano/segmentor": (492_576, 154_402_816, "d9d7e6af1026"),
    "hivit_base/classifier": (78_557_992, 17_816_604_672, "2c39bd014674"),
    "hivit_base/pretrainer": (108_392_992, 11_324_121_088, "2784066b9c97"),
    "hivit_base/detector": (81_552_000, 22_517_383_168, "fdec2001ca71"),
    "hivit_base/segmentor": (83_366_208, 149_216_559_104, "c474ff9e6424"),
    "hivit_large/classifier": (288_493_576, 61_117_544_448, "7a1582e8a323"),
    "hivit_large/pretrainer": (318_239_456, 21_926_309_888, "d053d66e90d1"),
    "hivit_large/detector": (291_398_464, 65_959_362_560, "92c6350ec4a7"),
    "hivit_large/segmentor": (294_355_744, 407_434_690_560, "2f1118624634"),
}
EVERY = [(name, kind) for name in MODELS for kind in BUILDERS]


def _build(name, kind, device):
    with torch.device(device):
        return BUILDERS[kind](CONFIGS[name])


def _forward(model, kind, size, device):
    with torch.device(device):
        images = torch.randn(2, 3, size, size)
        if kind == "pretrainer":
            return model(images, torch.rand(2, model.num_units))
        return model(images)


def _size(name, kind):
    return _crop_size(CONFIGS[name]) if kind == "segmentor" else CONFIGS[name].image_size


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_shapes_strides_and_gradients(name, kind):
    device = "cpu" if name == "hivit_nano" else "meta"
    torch.manual_seed(0)
    model, size = _build(name, kind, device), _size(name, kind)
    if kind == "classifier":
        torch.nn.init.normal_(model.head.weight, std=0.02)
    out = _forward(model, kind, size, device)
    if kind == "classifier":
        assert out.shape == (2, 1000)
        features = model.frozen_features(torch.zeros(2, 3, size, size, device=device))
        assert features.shape == (2, model.feature_width)
        total = out.square().sum()
    elif kind == "pretrainer":
        assert out.pred_BND.shape == (2, (size // 16) ** 2, 768)
        assert out.mask_BN.shape == out.pred_BND.shape[:2]
        total = out.pred_BND.square().sum()
    else:
        strides = (4, 8, 16, 32, 64)[: len(out)]
        for x_BCHW, num_channels, stride in zip(out, model.widths, strides, strict=True):
            assert x_BCHW.shape == (2, num_channels, size // stride, size // stride)
        total = sum(x.square().sum() for x in out)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert not without
    if device == "cpu":
        dead = [n for n, p in model.named_parameters() if not p.grad.isfinite().all() or not p.grad.any()]
        assert not dead


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_names_parameters_and_macs_stay(name, kind):
    state = _build(name, kind, "meta").state_dict()
    lines = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(state.items()))
    cost = measure_cost(lambda: BUILDERS[kind](CONFIGS[name]), _size(name, kind))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    assert (cost.params, cost.macs, digest) == PINNED[f"{name}/{kind}"]


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_tells_the_truth(name):
    entry = MODELS[name]
    cost = measure_cost(lambda: BUILDERS["classifier"](CONFIGS[name]), entry.image_size)
    assert (cost.params, cost.macs) == (entry.classifier_params, entry.classifier_macs)
    if entry.published_params is not None:
        assert cost.params / 1e6 == pytest.approx(entry.published_params, abs=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_a_library_user_gets_a_backbone(name):
    with torch.device("meta"):
        backbone = create_backbone(name, relative_position=True)
        features = backbone.forward_stages(torch.empty(1, 3, backbone.image_size, backbone.image_size))
    assert backbone.num_blocks == sum(backbone.shape.depths)
    assert features.level16_BNC.shape == (1, backbone.grid_side**2, backbone.widths[-1])


def test_the_same_seed_gives_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(_build("hivit_nano", "pretrainer", "cpu").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
