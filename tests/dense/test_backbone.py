"""The maps that the heads see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.dense.backbone import DenseMaps

pytestmark = pytest.mark.dense


@pytest.fixture
def make_maps(tiny_recipe):
    def make(task):
        torch.manual_seed(0)
        model = tiny_recipe.model.model_dump(mode="json")
        model["pyramid"]["dense_depth"] = 1
        return DenseMaps(task, model, image_size=64, drop_path=0.0).eval()

    return make


def test_detection_gets_five_levels_of_the_pyramid(make_maps):
    maps, images = make_maps("detect"), torch.randn(2, 3, 64, 96)
    levels = maps(images)
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32, 64)
    ]
    features = maps.net.features(images)
    for level, expected in zip(levels, (features.o4, features.o8, features.o16), strict=False):
        assert torch.equal(level, expected)
    # Level 32 is the mean of 2 x 2 of level 16; level 64 that of level 32.
    o16 = levels[2]
    means = (o16[..., ::2, ::2] + o16[..., 1::2, ::2] + o16[..., ::2, 1::2] + o16[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(levels[3], means)
    torch.testing.assert_close(levels[4], F.avg_pool2d(means, 2))


def test_segmentation_gets_pyramid_and_stage_side_by_side(make_maps):
    maps, images = make_maps("segment"), torch.randn(2, 3, 64, 64)
    levels = maps(images)
    width4, width8, width16 = maps.net.backbone.widths
    assert [tuple(level.shape[1:]) for level in levels] == [
        (16 + width4, 16, 16),
        (16 + width8, 8, 8),
        (16 + width16, 4, 4),
        (16 + width16, 2, 2),
    ]
    features = maps.net.features(images)
    assert torch.equal(levels[1], torch.cat([features.o8, features.f8], dim=1))
    assert torch.equal(levels[2][:, 16:], features.x16)
    corner = levels[2][:, :, :2, :2].amax(dim=(2, 3))
    assert torch.equal(levels[3][:, :, 0, 0], corner)


def test_norms_and_positions_are_those_of_dense_tasks(make_maps):
    for task, has_bias in (("detect", False), ("segment", True)):
        net = make_maps(task).net
        assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
        assert any("relative_table" in name for name, _ in net.named_parameters()) == has_bias
        assert len(net.pyramid.fuse8) == 1


def test_segmentation_refuses_another_size(make_maps):
    with pytest.raises(InputError, match="64 x 64"):
        make_maps("segment")(torch.randn(1, 3, 64, 96))
