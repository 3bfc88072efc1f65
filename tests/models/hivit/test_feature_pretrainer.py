"""The network that predicts a teacher's features: masks, early head, leaks, drop path, weights handed on."""

from __future__ import annotations

import pytest
import torch

from vitpipe.contracts.errors import InputError
from vitpipe.models.build import build_classifier, build_dense
from vitpipe.models.convert import convert_state
from vitpipe.models.families import family_of
from vitpipe.models.hivit.axis_attention import AxisAttention
from vitpipe.models.hivit.feature_pretrainer import early_block
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import load_into, save_weights


@pytest.fixture
def clip_nano(nano):
    return nano.model_copy(update={"layer_scale": 0.1})


def _built(model, **changes):
    torch.manual_seed(5)
    options = {"target_width": 24, "drop_path": 0.0, "aligned": True, **changes}
    return family_of(model).feature_predictor(model, **options).eval()


def _images(seed):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


MASK = torch.zeros(2, 16).index_fill(1, torch.tensor([0, 1, 4, 5, 10]), 1.0)


def _with_other_hidden_units(images):
    """The same images with noise where units are hidden."""
    hidden = MASK.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3).bool()
    return torch.where(hidden, _images(99), images)


@torch.no_grad()
def test_hidden_content_reaches_nothing_when_masks_are_aligned(clip_nano):
    model, images = _built(clip_nano), _images(0)
    first, second = model(images, MASK), model(_with_other_hidden_units(images), MASK)
    assert first.main_BND.shape == first.early_BND.shape == (2, 16, 24)
    torch.testing.assert_close(second.main_BND, first.main_BND, atol=0.0, rtol=0.0)
    torch.testing.assert_close(second.early_BND, first.early_BND, atol=0.0, rtol=0.0)


@torch.no_grad()
def test_as_released_hidden_content_passes_beside_the_mask_at_hidden_units_only(clip_nano):
    model, images = _built(clip_nano, aligned=False), _images(0)
    first, second = model(images, MASK), model(_with_other_hidden_units(images), MASK)
    changed = (first.main_BND - second.main_BND).abs().amax(-1) > 0
    assert torch.equal(changed, MASK.bool())
    torch.testing.assert_close(second.early_BND, first.early_BND, atol=0.0, rtol=0.0)


@pytest.mark.parametrize(("depth", "index"), [(24, 18), (40, 30), (4, 3)])
def test_the_early_head_reads_three_quarters_of_the_last_stage(depth, index):
    assert early_block(depth) == index


def test_the_early_head_trains_nothing_behind_its_block(clip_nano):
    model = _built(clip_nano)
    model(_images(0), MASK).early_BND.sum().backward()
    assert model.backbone.stage16[3].mlp.fc1.weight.grad is not None
    assert model.pyramid.lateral8.weight.grad is None
    assert model.predictor.mask_token.grad.abs().sum() > 0


def test_drop_ratios_of_the_early_blocks_are_those_from_the_tap_on(clip_nano):
    model = _built(clip_nano, drop_path=0.3)
    ratios = [block.drop_ratio for block in model.backbone.stage16]
    assert ratios[-1] == pytest.approx(0.3)
    assert [block.drop_ratio for block in model.predictor.early_blocks] == [ratios[3], ratios[3]]


def test_a_mask_of_another_grid_is_refused(clip_nano):
    with pytest.raises(InputError, match="mask has 9 units, the network is built for 16"):
        _built(clip_nano)(_images(0), torch.zeros(2, 9))


def test_the_official_network_is_ours(golden):
    """Every official tensor has its place, and none of ours is missing: names, shapes, count."""
    official = golden.empty_state("clip_base_pretrain_512")
    state = convert_state(official).state
    assert state["predictor.early_blocks.1.attn.relative_table"].shape == (729, 8)
    assert state["predictor.early_pred.weight"].shape == (512, 512)
    assert state["predictor.mask_token"].shape == (1, 1, 512)
    assert state["backbone.stage16.23.gamma_1"].shape == (512,)


def test_its_weights_start_classifier_detector_and_segmentor(clip_nano, tmp_path):
    model = _built(clip_nano)
    save_weights(model, tmp_path / "a.safetensors")
    for network in (
        build_classifier(clip_nano, num_classes=3),
        build_dense(clip_nano, "detect", image_size=64),
        build_dense(clip_nano, "segment", image_size=128),
        build_dense(clip_nano.model_copy(update={"detect_position": "per_axis"}), "detect", image_size=64),
    ):
        report = transfer_weights(network, tmp_path / "a.safetensors")
        own = dict(network.named_parameters())
        assert torch.equal(own["backbone.stage16.1.gamma_2"], model.backbone.stage16[1].gamma_2)
        assert all(row.why for row in report.rows if row.outcome in ("missing", "unused", "fresh"))
    load_into(_built(clip_nano), model.state_dict())


@torch.no_grad()
def test_positions_per_axis_spelt_out():
    torch.manual_seed(0)
    attention = AxisAttention(12, 3, grid_side=2)
    for grid in ((2, 2), (3, 4)):
        rows, columns = grid
        q = torch.randn(2, 3, rows * columns, 4)
        tables = []
        for table, side in ((attention.row_table, rows), (attention.column_table, columns)):
            needed = 2 * side - 1
            if len(table) != needed:
                table = torch.nn.functional.interpolate(table.t()[None], size=needed, mode="linear")[0].t()
            tables.append(table)
        bias = attention.bias_of(q, grid)
        for i in range(rows * columns):
            for j in range(rows * columns):
                down, across = i // columns - j // columns, i % columns - j % columns
                vector = tables[0][down + rows - 1] + tables[1][across + columns - 1]
                torch.testing.assert_close(bias[:, :, i, j], q[:, :, i] @ vector)
