"""The pyramid: conversion from units to maps, and no mixing of positions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.models.build import build_dense
from vitpipe.models.hivit.hivit import StageFeatures
from vitpipe.models.hivit.pyramid import Pyramid, Split, to_map


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.sampled_from([1, 2, 4]))
def test_to_map_puts_every_sub_token_where_it_came_from(rows, columns, side):
    plane = torch.arange(rows * side * columns * side).float().view(1, 1, rows * side, columns * side)
    units = [
        plane[0, 0, r * side : (r + 1) * side, c * side : (c + 1) * side]
        for r in range(rows)
        for c in range(columns)
    ]
    x_BNhhC = torch.stack(units)[None, ..., None]
    assert torch.equal(to_map(x_BNhhC, (rows, columns)), plane)


def test_split_places_the_four_quarters_as_children():
    split = Split(6, 5, norm_eps=1e-6)
    x = torch.randn(2, 3, 2, 2, 6)
    flat = split.linear(split.norm(x))
    out = split(x)
    assert out.shape == (2, 3, 4, 4, 5)
    for row in (0, 1):
        for column in (0, 1):
            quarter = (2 * row + column) * 5
            assert torch.equal(out[:, :, row::2, column::2], flat[..., quarter : quarter + 5])


def _stages(num_units=3):
    shapes = ((2, num_units, 4, 4, 8), (2, num_units, 2, 2, 16), (2, num_units, 32))
    return StageFeatures(*(torch.randn(shape, requires_grad=True) for shape in shapes))


def test_no_level_mixes_units_or_hides_a_stage():
    torch.manual_seed(0)
    stages = _stages()
    for level in Pyramid((8, 16, 32), width=12, depth=2)(stages):
        needed = stages if level.shape[2] == 4 else stages[2:] if level.shape[2] == 1 else stages[1:]
        gradients = torch.autograd.grad(level[:, 1].square().sum(), needed, retain_graph=True)
        for gradient in gradients:
            assert gradient[:, 1].any()
            assert not gradient[:, [0, 2]].any()


def test_the_top_needs_no_projection_of_its_own_width():
    names = [n for n, _ in Pyramid((8, 16, 32), width=32, depth=1).named_parameters()]
    assert not [n for n in names if n.startswith("project16")]
    names = [n for n, _ in Pyramid((8, 16, 32), width=16, depth=1).named_parameters()]
    assert "project16.bias" in names


def test_dense_features_of_an_image_that_is_not_square(nano):
    model = build_dense(nano, "detect", image_size=64).eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 48, 96))
        stages = model.backbone.forward_stages(torch.zeros(1, 3, 48, 96))
    sizes = [(12, 24), (6, 12), (3, 6)] * 2
    assert [f.shape[-2:] for f in features] == sizes
    assert [f.shape[1] for f in features] == [48, 48, 48, 16, 32, 64]
    assert stages.level16_BNC.shape == (1, 18, 64)


def test_dense_norms_have_their_own_eps(nano):
    model = build_dense(nano, "detect", image_size=64)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
