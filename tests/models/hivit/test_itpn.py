"""Masked pre-training: hidden pixels do not leak, and the mask follows from the noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.models.build import build_pretrainer
from vitpipe.models.hivit.config import DecoderConfig
from vitpipe.models.masking import choose_units, patchify
from vitpipe.models.positions import sincos_table


@pytest.fixture(scope="module")
def model(nano):
    torch.manual_seed(0)
    return build_pretrainer(nano).eval()


def _hidden_pixels(mask_BN, size):
    side = size // 16
    return (
        mask_BN.view(-1, 1, side, side)
        .repeat_interleave(16, 2)
        .repeat_interleave(16, 3)
        .expand(-1, 3, -1, -1)
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
@torch.no_grad()
def test_replacing_hidden_units_changes_nothing(model, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    noise = torch.rand(2, 16, generator=generator)
    first = model(images, noise)
    hidden = _hidden_pixels(first.mask_BN, 64)
    changed = torch.where(hidden > 0, 100 * torch.randn(images.shape, generator=generator), images)
    assert torch.equal(first.pred_BND, model(changed, noise).pred_BND)
    for level, level_changed in zip(
        model.encode(images, first.kept_BK), model.encode(changed, first.kept_BK), strict=True
    ):
        assert torch.equal(level, level_changed)


def test_predictions_depend_on_seen_pixels_alone(model):
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    out = model(images, torch.rand(1, 16))
    out.pred_BND[out.mask_BN.bool()].square().sum().backward()
    per_unit = patchify(images.grad).abs().sum(-1)
    assert torch.equal(per_unit > 0, out.mask_BN == 0)


@settings(max_examples=40, deadline=None)
@given(
    num_units=st.integers(4, 60),
    mask_ratio=st.floats(0.1, 0.9),
    seed=st.integers(0, 1000),
)
def test_the_mask_follows_from_the_noise(num_units, mask_ratio, seed):
    noise = torch.rand(3, num_units, generator=torch.Generator().manual_seed(seed))
    choice = choose_units(noise, mask_ratio)
    num_kept = int(num_units * (1 - mask_ratio))
    assert choice.kept_BK.shape == (3, num_kept)
    for image in range(3):
        kept = choice.kept_BK[image].tolist()
        seen = noise[image, kept].tolist()
        assert seen == sorted(noise[image].tolist())[:num_kept]
        assert set(kept) == set((choice.mask_BN[image] == 0).nonzero().flatten().tolist())
        order = noise[image].argsort()
        assert torch.equal(order[choice.restore_BN[image]], torch.arange(num_units))


@torch.no_grad()
def test_a_hidden_unit_enters_as_three_mask_tokens(model):
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    choice = choose_units(noise, 0.75)
    x_BND = model.decoder.join(model.encode(images, choice.kept_BK), choice.restore_BN)
    for image in range(2):
        for unit in choice.mask_BN[image].nonzero().flatten().tolist():
            expected = 3 * model.decoder.mask_token[0, 0] + model.decoder.fixed_position[0, unit]
            torch.testing.assert_close(x_BND[image, unit], expected)


def test_start_values(model, nano):
    side = nano.image_size // 16
    assert torch.equal(model.backbone.absolute_position, sincos_table(side, 64))
    assert model.backbone.absolute_position.requires_grad
    assert torch.equal(model.decoder.fixed_position, sincos_table(side, nano.decoder.width))
    assert "decoder.fixed_position" not in dict(model.named_parameters())
    assert 0.01 < model.decoder.mask_token.std() < 0.03


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_a_patch_is_flattened_by_row_column_colour(rows, columns):
    images = torch.randn(2, 3, 16 * rows, 16 * columns)
    patches = patchify(images)
    assert patches.shape == (2, rows * columns, 768)
    for unit in range(rows * columns):
        top, left = unit // columns * 16, unit % columns * 16
        crop = images[1, :, top : top + 16, left : left + 16]
        assert torch.equal(patches[1, unit].view(16, 16, 3), crop.permute(1, 2, 0))


def test_invalid_sizes_and_ratios_are_refused(model, nano):
    with pytest.raises(InputError, match="built for 64 x 64"):
        model(torch.zeros(1, 3, 96, 96), torch.rand(1, 36))
    with pytest.raises(InputError, match="noise is for 9 units"):
        model(torch.zeros(1, 3, 64, 64), torch.rand(1, 9))
    with pytest.raises(InputError, match="all or none of the 16 units"):
        build_pretrainer(nano, mask_ratio=0.99)
    with pytest.raises(RecipeError, match="decoder's width of 72"):
        build_pretrainer(nano.model_copy(update={"decoder": DecoderConfig(width=72)}))
    with pytest.raises(RecipeError, match="did you mean 'hivit_nano'"):
        build_pretrainer(nano.model_copy(update={"name": "hivit_nono"}))
