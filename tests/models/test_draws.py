"""Draws that belong to images: statistics, independence of the batch, recomputation, the library's use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from vitpipe.models import draws
from vitpipe.models.blocks import AttentionBlock, drop_path, dropout
from vitpipe.models.draws import checkpoint_contexts, image_draws, keep, keep_elements, uniform
from vitpipe.models.revcolv2.columns import RevColV2Shape
from vitpipe.models.revcolv2.revcolv2 import RevColV2

ONES = torch.ones(1)


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**40), min_size=2, max_size=9, unique=True))
def test_numbers_belong_to_the_image_and_the_key(key, indices):
    indices = torch.tensor(indices)
    whole = uniform(key, indices, 5)
    assert whole.shape == (len(indices), 5)
    assert whole.dtype == torch.float32
    assert ((whole >= 0) & (whole < 1)).all()
    assert torch.equal(uniform(key, indices.flip(0), 5), whole.flip(0))
    assert torch.equal(uniform(key, indices[1:], 2, first=3), whole[1:, 3:])
    assert not torch.equal(uniform(key ^ 1, indices, 5), whole)


def _splitmix64(x):
    """Its output function on Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 10))
def test_is_splitmix64_with_a_hash_as_its_start(key, index, position):
    golden = 0x9E3779B97F4A7C15
    start = _splitmix64(_splitmix64((index * golden + key) % 2**64))
    assert _splitmix64((0 + golden) % 2**64) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    expected = (_splitmix64((start + (position + 1) * golden) % 2**64) >> 40) / 2**24
    assert uniform(key, torch.tensor([index]), 1, first=position).item() == expected
    # Fixed values: results must not change between versions or machines.
    assert uniform(1, torch.tensor([0, 1]), 1).flatten().tolist() == [
        0.25588518381118774,
        0.43274492025375366,
    ]


def test_numbers_are_uniform_and_independent():
    """Mean, variance, and correlations between neighbouring images, numbers and keys of 250,000 draws."""
    num = 500
    x = uniform(3, torch.arange(num), num).double()
    assert x.mean().item() == pytest.approx(0.5, abs=0.003)
    assert x.var().item() == pytest.approx(1 / 12, abs=0.002)
    others = (x.roll(1, 0), x.roll(1, 1), uniform(4, torch.arange(num), num).double(), x.t())
    for other in others:
        correlation = torch.corrcoef(torch.stack([x.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.01
    counts = torch.histc(x.float(), bins=50, min=0, max=1)
    # Chi-square with 49 degrees of freedom: 99.99 % are below 96.
    assert ((counts - num * num / 50) ** 2 / (num * num / 50)).sum() < 96


def test_each_call_draws_anew_and_each_division_the_same():
    def made(*parts):
        rows = []
        for part in parts:
            with image_draws(11, torch.tensor(part)):
                rows.append(torch.stack([keep(len(part), 0.5, ONES) for _ in range(70)], dim=1))
        return torch.cat(rows)

    whole = made(range(40, 60))
    assert torch.equal(made(range(40, 47), range(47, 60)), whole)
    assert len({tuple(column.tolist()) for column in whole.t()}) == 70
    assert 0.4 < whole.mean() < 0.6


def test_views_of_an_image_draw_for_themselves():
    with image_draws(5, torch.arange(8)):
        both = keep(16, 0.5, ONES).view(2, 8)
        after = keep(8, 0.5, ONES)
    with image_draws(5, torch.arange(8)):
        one_by_one = [keep(8, 0.5, ONES) for _ in range(3)]
    assert torch.equal(torch.stack([*both, after]), torch.stack(one_by_one))
    with image_draws(5, torch.arange(8)), pytest.raises(ValueError, match="12 rows for 8 images"):
        keep(12, 0.5, ONES)


def test_outside_of_training_torchs_generator_is_used():
    x = torch.ones(64, 3)
    torch.manual_seed(0)
    first = drop_path(x, 0.5, training=True)
    torch.manual_seed(0)
    assert torch.equal(drop_path(x, 0.5, training=True), first)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    state = torch.get_rng_state()
    with image_draws(5, torch.arange(64)):
        drop_path(x, 0.5, training=True)
        assert torch.equal(drop_path(x, 0.5, training=False), x)
        assert draws.place().position == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recomputation_draws_the_same_also_after_the_context():
    x = torch.ones(32, 2, requires_grad=True)

    def branch(x):
        return drop_path(drop_path(x, 0.5, training=True) * 3, 0.25, training=True)

    with image_draws(5, torch.arange(32)):
        expected = branch(x)
        plain = branch(x)
    with image_draws(5, torch.arange(32)):
        branch(x)
        again = checkpoint(branch, x, use_reentrant=False, context_fn=checkpoint_contexts)
        assert draws.place().position == 4
    assert not torch.equal(expected, plain)
    assert torch.equal(again, plain)
    (gradient,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(gradient, plain.detach())


def test_all_memory_modes_drop_the_same_branches():
    ends = {}
    for mode in ("plain", "column", "reversible"):
        torch.manual_seed(0)
        shape = RevColV2Shape("test", width=32, num_heads=2, depth=1)
        network = RevColV2(shape, image_size=32, drop_path=0.6, memory_mode=mode).double()
        images = torch.randn(6, 3, 32, 32, dtype=torch.double)
        with image_draws(9, torch.arange(6)):
            loss = sum(level.square().mean() for level in network(images))
        loss.backward()
        ends[mode] = [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
    for mode in ("column", "reversible"):
        assert len(ends[mode]) == len(ends["plain"]) > 10
        for ours, plain in zip(ends[mode], ends["plain"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)


def test_dropout_draws_for_each_image_and_element_anew():
    def made(*parts):
        rows = []
        for part in parts:
            with image_draws(11, torch.tensor(part)):
                x = torch.ones(len(part), 3, 333)
                rows.append(torch.stack([keep_elements(x, 0.9) for _ in range(3)], dim=1))
        return torch.cat(rows)

    whole = made(range(40, 60))
    assert torch.equal(made(range(40, 47), range(47, 60)), whole)
    flat = whole.flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    # 59,940 draws: the share of ones has a standard deviation of 0.0012.
    assert whole.mean().item() == pytest.approx(0.9, abs=0.005)
    # Neighbours, which share a hash, and the same element of other draws are independent.
    for other in (flat.roll(1, 1), flat.roll(1, 0), flat.roll(4, 1)):
        correlation = torch.corrcoef(torch.stack([flat.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.02


def test_two_views_of_an_image_drop_other_elements():
    with image_draws(3, torch.tensor([5, 6])):
        twice = keep_elements(torch.ones(4, 50), 0.5)
    assert len({tuple(row.tolist()) for row in twice}) == 4
    with image_draws(3, torch.tensor([5, 6])), pytest.raises(ValueError, match="3 rows for 2 images"):
        keep_elements(torch.ones(3, 50), 0.5)


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.5])
def test_dropout_keeps_the_mean_and_stays_away_in_evaluation(ratio):
    torch.manual_seed(0)
    x = torch.ones(8, 10_000)
    for drawn in (dropout(x, ratio, training=True), _within_draws(x, ratio)):
        assert drawn.mean().item() == pytest.approx(1.0, abs=0.02)
        assert (drawn == 0).float().mean().item() == pytest.approx(ratio, abs=0.01)
    assert dropout(x, ratio, training=False) is x


def _within_draws(x, ratio):
    with image_draws(1, torch.arange(len(x))):
        return dropout(x, ratio, training=True)


def test_a_block_with_dropout_is_the_same_when_it_is_recomputed():
    torch.manual_seed(0)
    block = AttentionBlock(16, 2, 2, norm_eps=1e-6, dropout=0.3)
    x = torch.randn(4, 9, 16, requires_grad=True)
    gradients = []
    for recomputed in (False, True):
        with image_draws(5, torch.arange(4)):
            out = (
                checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)
                if recomputed
                else block(x)
            )
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*gradients)
