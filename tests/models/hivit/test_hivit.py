"""The backbone's parts compared with their definitions; invalid input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import Attention, AttentionBlock, drop_path
from vitpipe.models.build import build_classifier, build_pretrainer
from vitpipe.models.hivit.hivit import SHAPES, HiViT, HiViTShape, Merge, Stem
from vitpipe.models.hivit.hivit_classifier import HiViTClassifier, HiViTEncoder
from vitpipe.models.masking import gather_units
from vitpipe.models.positions import relative_index, resample_positions, resize_relative_table

TINY = HiViTShape("tiny", (1, 1, 2), (8, 16, 32), num_heads=2)


def _tiny(**options):
    torch.manual_seed(0)
    model = HiViT(TINY, **{"image_size": 48, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_a_stem_unit_sees_its_own_pixels_only():
    stem = Stem(8, norm_eps=1e-6)
    images = torch.randn(2, 3, 32, 48)
    x_BNhhC = stem(images)
    assert x_BNhhC.shape == (2, 6, 4, 4, 8)
    fine = stem.proj(images)
    # Unit 4 is row 1, column 1; its sub-token (2, 3) is the fine map's row 4+2, column 4+3.
    torch.testing.assert_close(x_BNhhC[:, 4, 2, 3], stem.norm(fine[:, :, 6, 7]))


def test_merge_concatenates_children_row_parity_first():
    merge = Merge(4, norm_eps=1e-6)
    x = torch.randn(2, 3, 4, 4, 4)
    children = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    expected = merge.linear(merge.norm(torch.cat(children, dim=-1)))
    torch.testing.assert_close(merge(x), expected)


def test_attention_with_bias_is_softmax_of_scores_plus_table():
    torch.manual_seed(0)
    side, num_heads, width = 3, 2, 8
    attention = Attention(width, num_heads, relative_grid=side)
    torch.nn.init.normal_(attention.relative_table)
    x = torch.randn(2, side * side, width)
    q, k, v = attention.qkv(x).view(2, 9, 3, num_heads, 4).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(4)
    for i in range(9):
        for j in range(9):
            row = (i // 3 - j // 3 + 2) * 5 + (i % 3 - j % 3 + 2)
            scores[:, :, i, j] += attention.relative_table[row]
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, width)
    torch.testing.assert_close(attention(x, relative_index(side)), attention.proj(out))


@settings(max_examples=15, deadline=None)
@given(side=st.integers(1, 6))
def test_relative_index_is_a_function_of_the_offset(side):
    index = relative_index(side)
    assert index.min() == 0
    assert index.max() == (2 * side - 1) ** 2 - 1
    assert len(index.unique()) == (2 * side - 1) ** 2
    assert torch.equal(index + index.T, torch.full_like(index, (2 * side - 1) ** 2 - 1))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), num_kept=st.integers(1, 6))
def test_gathering_takes_whole_units(seed, num_kept):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, 2, 2, 5, generator=generator)
    kept = torch.stack([torch.randperm(6, generator=generator)[:num_kept] for _ in range(3)])
    taken = gather_units(x, kept)
    for image in range(3):
        assert torch.equal(taken[image], x[image, kept[image]])


@pytest.mark.parametrize("relative_position", [False, True])
def test_kept_units_keep_their_order_and_positions(relative_position):
    model = _tiny(relative_position=relative_position)
    images = torch.randn(2, 3, 48, 48)
    order = torch.stack([torch.randperm(9), torch.randperm(9)])
    whole, shuffled = model.forward_stages(images), model.forward_stages(images, order)
    for all_units, some_units in zip(whole, shuffled, strict=True):
        torch.testing.assert_close(gather_units(all_units, order), some_units, rtol=1e-4, atol=1e-4)


def test_the_table_is_used_as_it_is_unless_units_are_missing():
    model = _tiny()
    table = model.absolute_position
    assert model._positions((3, 3), None) is table
    kept = torch.tensor([[4, 0], [8, 2]])
    resampled = resample_positions(table, (3, 3))
    assert not torch.allclose(resampled, table)
    assert torch.equal(model._positions((3, 3), kept), resampled[0][kept])
    assert model._positions((2, 5), None).shape == (1, 10, 32)


def test_without_a_bias_any_multiple_of_16_is_taken():
    features = _tiny().forward_stages(torch.randn(1, 3, 32, 80))
    assert [f.shape for f in features] == [(1, 10, 4, 4, 8), (1, 10, 2, 2, 16), (1, 10, 32)]


def test_resizing_a_relative_table_keeps_a_constant_and_the_centre():
    constant = resize_relative_table(torch.full((25, 2), 3.0), 81)
    torch.testing.assert_close(constant, torch.full((81, 2), 3.0))
    table = torch.zeros(25, 1)
    table[12] = 1.0
    assert resize_relative_table(table, 81).argmax() == 40


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25, training=True)
    per_image = dropped.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    assert per_image[:, 0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop_path(x, 0.25, training=False) is x


def test_drop_ratios_rise_linearly_over_all_blocks():
    model = HiViT(SHAPES["hivit_nano"], image_size=64, drop_path=0.5)
    ratios = [b.drop_ratio for stage in (model.stage4, model.stage8, model.stage16) for b in stage]
    assert ratios == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_layer_scale_multiplies_every_branch():
    block = AttentionBlock(8, 2, 4, norm_eps=1e-6, layer_scale=0.0)
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x), x)
    names = dict(HiViT(TINY, image_size=32, layer_scale=0.1).named_parameters())
    assert [names[n][0].item() for n in names if "gamma" in n] == pytest.approx([0.1] * 6)
    assert not [n for n, _ in HiViT(TINY, image_size=32).named_parameters() if "gamma" in n]


def test_start_values():
    torch.manual_seed(0)
    model = HiViTClassifier(HiViT(SHAPES["hivit_nano"], image_size=64, relative_position=True), 100, 2e-5)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    block = model.backbone.stage16[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    paper = HiViT(HiViTShape("paper", (1, 1, 1), (16, 32, 64), num_heads=4), image_size=64)
    assert paper.stage16[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert paper.stem.proj.weight.abs().max() <= (3 * 16) ** -0.5
    assert not block.mlp.fc1.bias.any()
    assert not block.attn.relative_table.any()
    assert model.backbone.absolute_position.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("size", [0, 8, 100, 65])
def test_a_size_that_is_no_multiple_of_16_is_refused(size):
    with pytest.raises(InputError, match="multiple of 16"):
        HiViT(TINY, image_size=size)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="40 x 48"):
        _tiny().forward_stages(torch.zeros(1, 3, 40, 48))
    with pytest.raises(InputError, match="relative position bias"):
        _tiny(relative_position=True).forward_stages(torch.zeros(1, 3, 48, 64))


def test_features_are_the_normed_mean_of_tokens():
    model = HiViTClassifier(_tiny(), 5).eval()
    images = torch.randn(2, 3, 48, 48)
    tokens = model.backbone.forward_stages(images).level16_BNC
    expected = torch.nn.functional.layer_norm(tokens.mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(model(images), model.head(expected))


@torch.no_grad()
def test_every_block_gives_its_tokens_and_its_attention():
    torch.manual_seed(4)
    model = HiViTEncoder(_tiny(relative_position=True)).eval()
    for block in model.backbone.stage16:
        block.attn.relative_table.normal_()
    images = torch.randn(2, 3, 48, 48)
    found = model.features(images, blocks=(-1, 0), attention=True)
    tokens, index = model.backbone.before_stage16(images).level16_BNC, model.backbone.relative_rows()
    by_hand = []
    for block in model.backbone.stage16:
        # What the block adds by attention is the values mixed by these probabilities.
        values = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[2]
        values_BHNc = values.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        shares = block.attention(tokens, index)
        mixed = block.attn.proj((shares @ values_BHNc).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, block.attn(block.norm1(tokens), index))
        tokens = block(tokens, index)
        by_hand.append((tokens, shares))
    for position, number in enumerate((-1, 0)):
        assert torch.equal(found.tokens[position], by_hand[number][0])
        assert torch.equal(found.attention[position], by_hand[number][1])
    assert found.grids == ((3, 3), (3, 3))
    assert torch.equal(found.pooled, by_hand[-1][0].mean(dim=1))
    row, column = 2, 1
    assert torch.equal(found.maps()[0][..., row, column], found.tokens[0][:, 3 * row + column])


@torch.no_grad()
def test_bf16_stays_close_to_float32(nano):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    classifier = build_classifier(nano.model_copy(update={"head_init_std": 0.2}), num_classes=5).eval()
    for block in classifier.backbone.stage16:
        block.attn.relative_table.normal_()
    pretrainer = build_pretrainer(nano).eval()
    for run in (lambda: classifier(images), lambda: pretrainer(images, noise).pred_BND):
        exact = run()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run().float()
        assert (rounded - exact).norm() < 0.03 * exact.norm()
