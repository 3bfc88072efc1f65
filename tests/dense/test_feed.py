"""The order of samples: the same for any number of ranks and after any restart; kinds are kept together."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.dense.feed import MicroBatches, SeededDataset, eval_loader, train_loader
from vitpipe.dense.plan import DensePlan

pytestmark = pytest.mark.dense


def plan_of(num_steps, micro, accumulation, num_ranks):
    return DensePlan(
        num_steps=num_steps,
        global_batch=micro * accumulation * num_ranks,
        micro_batch=micro,
        accumulation=accumulation,
        num_ranks=num_ranks,
        precision="off",
        norm="BN",
        lr_factor=lambda step: 1.0,
        notes=(),
    )


def steps_of(plan, groups, start=0):
    """Per step the sorted places of all ranks."""
    ranks = [
        list(MicroBatches(plan, groups, seed=3, rank=r, start_step=start)) for r in range(plan.num_ranks)
    ]
    a = plan.accumulation
    count = len(ranks[0]) // a
    return [
        sorted(p for rank in ranks for micro in rank[s * a : (s + 1) * a] for p in micro)
        for s in range(count)
    ]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(20, 30))
def test_steps_do_not_depend_on_the_ranks(micro, accumulation, num_ranks, start, num_samples):
    plan = plan_of(5, micro, accumulation, num_ranks)
    alone = plan_of(5, plan.global_batch, 1, 1)
    groups = [index % 2 for index in range(num_samples)]
    if plan.global_batch > num_samples:
        return
    whole = steps_of(alone, groups)
    assert steps_of(plan, groups) == whole
    assert steps_of(plan, groups, start) == whole[start:]
    assert len(MicroBatches(plan, groups, seed=3, rank=0, start_step=start)) == (5 - start) * accumulation


def test_an_epoch_has_no_sample_twice():
    places = [p for step in steps_of(plan_of(6, 4, 1, 1), [0] * 12) for p in step]
    for epoch in (0, 1):
        assert sorted(index for e, _, index in places if e == epoch) == list(range(12))


def test_kinds_are_mixed_in_at_most_one_batch_of_a_step():
    groups = [index % 3 == 0 for index in range(24)]
    for seed in range(5):
        batches = list(MicroBatches(plan_of(2, 2, 6, 1), groups, seed=seed, rank=0, start_step=0))
        for step in (batches[:6], batches[6:]):
            mixed = [batch for batch in step if len({groups[index] for _, _, index in batch}) > 1]
            assert len(mixed) <= 1


class Drawing:
    """A dataset whose samples are draws from every global generator."""

    metainfo = SimpleNamespace()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_are_a_function_of_seed_and_place():
    first, again = SeededDataset(Drawing(), 1), SeededDataset(Drawing(), 1)
    random.seed(5)
    assert first[0, 3, 2] == again[0, 3, 2]
    assert first[0, 3, 2] != first[1, 3, 2]
    assert first[0, 3, 2] != SeededDataset(Drawing(), 2)[0, 3, 2]


def test_loading_leaves_the_generators_alone():
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    _ = SeededDataset(Drawing(), 1)[0, 0, 0]
    assert torch.rand(()) == expected


def test_workers_change_nothing():
    plan = plan_of(3, 2, 1, 1)
    runs = [
        list(train_loader(Drawing(), plan, [0] * 8, seed=1, rank=0, start_step=0, workers=workers))
        for workers in (0, 1)
    ]
    assert runs[0] == runs[1]


def test_validation_samples_come_once_over_all_ranks():
    shares = [list(eval_loader(Drawing(), batch=1, rank=rank, num_ranks=3, workers=0)) for rank in range(3)]
    indices = sorted(index for share in shares for batch in share for index in batch[0])
    assert indices == list(range(8))
