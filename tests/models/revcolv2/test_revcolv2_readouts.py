"""RevColV2: read-outs, attention windows, parameter names, initial values, layer ids."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.positions import sincos_table
from vitpipe.models.revcolv2.columns import Block, RevColV2Shape
from vitpipe.models.revcolv2.dense_maps import RevColV2Dense
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer, resize_positions
from vitpipe.models.revcolv2.revcolv2_classifier import RevColV2Classifier, RevColV2Encoder

TINY = RevColV2Shape("tiny", width=24, num_heads=3, depth=2, neck_width=32)


def _backbone(shape=TINY, **options):
    torch.manual_seed(0)
    return RevColV2(shape, **{"image_size": 64, **options})


@pytest.mark.parametrize(("top_down", "num_unused"), [(1, 3), (2, 5), (3, 6), (5, 6)])
def test_the_classifier_runs_only_what_reaches_the_top(top_down, num_unused):
    backbone = _backbone(replace(TINY, num_top_down=top_down), trainable_positions=True)
    model = RevColV2Classifier(backbone, 7, head_init_std=0.02)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), model.head(backbone(images)[-1].mean(dim=(1, 2))))
    model(images).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    idle = {name for name, _ in model.named_parameters()} - trained
    levels = {re.match(r"backbone\.top_down\.\d+\.levels\.\d+", name) for name in idle if ".levels." in name}
    assert len({level[0] for level in levels}) == num_unused
    assert sum(".gamma." in name for name in idle) == num_unused
    assert model.num_classes == 7
    assert model.frozen_features(images).shape == (2, model.feature_width)
    assert 0 < model.head.fc.weight.std() < 0.03


def test_the_probe_runs_no_top_down_column():
    model = RevColV2Classifier(_backbone(), 3).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.frozen_features(images)
    states = model.backbone.encode(model.backbone.embed(images))
    assert torch.equal(features, states[3].mean(dim=(1, 2)))
    for parameter in model.backbone.top_down.parameters():
        parameter.data.fill_(math.nan)
    assert torch.equal(model.frozen_features(images), features)
    encoder = RevColV2Encoder(model.backbone)
    found = encoder.features(images, blocks=(0, -1))
    for tokens, level in zip(found.tokens, (states[0], states[3]), strict=True):
        assert torch.equal(tokens, level.flatten(1, 2))
    found.pooled.square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert not any("top_down" in name for name in trained)


def test_logits_and_the_grid_behind_them_come_of_one_pass():
    model = RevColV2Classifier(_backbone(), 3, head_init_std=0.02).eval()
    images = torch.randn(2, 3, 64, 32)
    found = model.forward_features(images)
    assert torch.equal(model.logits(found), model(images))
    assert found.grids == ((4, 2),)
    torch.testing.assert_close(found.tokens[0], model.backbone(images)[-1].flatten(1, 2))
    with pytest.raises(InputError, match="only the top level is run"):
        model.forward_features(images, blocks=(0,))
    with pytest.raises(InputError, match="cannot give its attention"):
        model.features(images, attention=True)


@pytest.mark.parametrize(("task", "widths"), [("segment", (24,) * 4), ("detect", (32,) * 5)])
def test_dense_maps(task, widths):
    model = RevColV2Dense(_backbone(), task)
    assert model.widths == widths
    maps = model(torch.randn(2, 3, 64, 128))
    strides = (4, 8, 16, 32, 64)[: len(widths)]
    for x_BCHW, width, stride in zip(maps, widths, strides, strict=True):
        assert x_BCHW.shape == (2, width, 64 // stride, 128 // stride)
    sum(x_BCHW.square().sum() for x_BCHW in maps).backward()
    dead = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not dead
    odd = model(torch.randn(1, 3, 48, 80))
    assert odd[3].shape[-2:] == (2, 3)
    assert model.layer_of("norms.0.weight") == model.layer_of("rescale.0.0.weight") == model.head_layer


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 7), breadth=st.integers(1, 7), side=st.integers(1, 4))
def test_windowed_attention(height, breadth, side):
    torch.manual_seed(0)
    block = Block(8, 2, drop_ratio=0.0, window=side).double()
    torch.nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(2, height, breadth, 8).double()
    expected = torch.zeros_like(x)
    for top in range(0, height, side):
        for left in range(0, breadth, side):
            window = torch.zeros(2, side, side, 8).double()
            part = x[:, top : top + side, left : left + side]
            window[:, : part.shape[1], : part.shape[2]] = part
            seen = block.attn(window.flatten(1, 2)).view_as(window)
            expected[:, top : top + side, left : left + side] = seen[:, : part.shape[1], : part.shape[2]]
    torch.testing.assert_close(block._attend(x), expected)


def test_windows_leave_the_last_block_global():
    shape = replace(TINY, depth=3)
    for column in _backbone(shape, window=2).columns:
        for position in range(4):
            assert [block.window for block in column.level(position).blocks] == [2, 2, None]
    images = torch.randn(1, 3, 64, 96)
    whole, windowed = _backbone(shape).eval(), _backbone(shape, window=6).eval()
    windowed.load_state_dict(whole.state_dict())
    narrow = _backbone(shape, window=2).eval()
    narrow.load_state_dict(whole.state_dict())
    # A single window of 6 x 6 units still holds two rows of zeros.
    assert not torch.allclose(whole(images)[0], windowed(images)[0], atol=1e-4)
    exact = _backbone(shape, window=4).eval()
    exact.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(images[..., :64])[0], exact(images[..., :64])[0], rtol=1e-4, atol=1e-4)


def test_names():
    names = {name for name, _ in RevColV2Pretrainer(_backbone(), 0.5).named_parameters()}
    column = {f"gamma.{level}" for level in range(4)}
    for level in range(4):
        for block in range(2):
            parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            column |= {
                f"levels.{level}.blocks.{block}.{part}.{kind}"
                for part in parts
                for kind in ("weight", "bias")
            }
    links = {f"{level}.{link}.{index}" for level in range(4) for link in ("down", "up") for index in (0, 1)}
    first = {name for name in links if "up" not in name and not name.startswith("0")}
    bottom_up = {name for name in links if not name.startswith(("0.down", "3.up"))}
    top_down = {name for name in links if not name.startswith(("3.down", "0.up"))}
    expected = {"mask_token"} | {
        f"{part}.{kind}"
        for part in ("pixel_norm", "pixel_head", "backbone.patch_embed")
        for kind in ("weight", "bias")
    }
    expected |= {"backbone.pos_embed", "backbone.top_down_pos_embed"}
    for prefix, used in (
        ("bottom_up.0", first),
        ("bottom_up.1", bottom_up),
        ("top_down.0", top_down),
        ("top_down.1", top_down),
    ):
        own = column if prefix != "bottom_up.0" else {name for name in column if "gamma" not in name}
        expected |= {f"backbone.{prefix}.{name}" for name in own}
        expected |= {
            f"backbone.{prefix}.levels.{name}.{kind}" for name in used for kind in ("weight", "bias")
        }
    assert names == expected


def test_positions():
    backbone = _backbone()
    assert not backbone.pos_embed.requires_grad
    assert torch.equal(backbone.pos_embed, sincos_table(4, 24))
    assert _backbone(trainable_positions=True).top_down_pos_embed.requires_grad
    table = backbone.pos_embed
    assert resize_positions(table, (4, 4)) is table
    square = table.view(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(3, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 18, 24)
    torch.testing.assert_close(resize_positions(table, (3, 6)), expected)
    assert backbone.eval()(torch.randn(1, 3, 48, 96))[0].shape == (1, 3, 6, 24)


def test_start_values():
    backbone = _backbone(replace(TINY, width=48))
    assert all((scale == 0.5).all() for column in backbone.columns for scale in column.scales())
    for name, parameter in backbone.named_parameters():
        if name.endswith(("bias", "norm1.weight")):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
    weight = backbone.patch_embed.weight
    assert weight.abs().max() <= math.sqrt(6 / (48 + 768))
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (48 + 768)), rel=0.05)
    token = RevColV2Pretrainer(backbone, 0.5).mask_token
    assert token.shape == (4, 1, 1, 48)
    assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_drop_path_rises_over_a_column_and_is_the_same_in_all():
    for column in _backbone(drop_path=0.7).columns:
        ratios = [block.drop_ratio for level in column.levels for block in level.blocks]
        assert ratios == pytest.approx([0.1 * index for index in range(8)])


def test_layer_ids():
    model = RevColV2Classifier(_backbone(), 5)
    ids = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(ids.values()) == set(range(model.num_layers))
    assert model.num_layers == 4 * 2 + 4 + 1
    assert ids["backbone.patch_embed.weight"] == ids["backbone.top_down_pos_embed"] == 0
    assert ids["backbone.bottom_up.0.levels.0.blocks.0.norm1.weight"] == 1
    assert ids["backbone.bottom_up.1.levels.2.blocks.1.mlp.fc1.bias"] == 2 * 2 + 1 + 1 + 1
    assert ids["backbone.top_down.1.levels.3.up.0.weight"] == 3 * 2 + 3 + 1
    assert ids["backbone.top_down.0.gamma.3"] == 3
    assert ids["head.fc.weight"] == 12
    decayed = [n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(model.no_decay)]
    assert not [name for name in decayed if "gamma" in name or "pos" in name]
    assert RevColV2Pretrainer(_backbone(), 0.5).layer_of("mask_token") == 12
