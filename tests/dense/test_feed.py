"""The order of samples: the same for any number of ranks and after any restart; kinds are kept together."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.resolve import TrainPlan
from vitpipe.data.moment import Moment
from vitpipe.dense.feed import MicroBatches, SeededBatches, eval_loader, train_batches

pytestmark = pytest.mark.dense


def plan_of(num_steps, micro, accumulation, num_ranks):
    batch = micro * accumulation * num_ranks
    return TrainPlan(
        steps_per_epoch=1, num_steps=num_steps, warmup_steps=0, peak_lr=1.0, min_lr=0.0, warmup_lr=0.0,
        global_batch=batch, micro_batch=micro, accumulation=accumulation, num_ranks=num_ranks, precision="off", reasons=(),
    )  # fmt: skip


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
        assert sorted(index for step, index in places if step // 3 == epoch) == list(range(12))


def test_kinds_are_mixed_in_at_most_one_batch_of_a_step():
    groups = [index % 3 == 0 for index in range(24)]
    for seed in range(5):
        batches = list(MicroBatches(plan_of(2, 2, 6, 1), groups, seed=seed, rank=0, start_step=0))
        for step in (batches[:6], batches[6:]):
            mixed = [batch for batch in step if len({groups[index] for _, index in batch}) > 1]
            assert len(mixed) <= 1


class Drawing:
    """A dataset whose samples are draws from every global generator."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
        return {"inputs": (index, *drawn), "data_samples": SimpleNamespace()}


def at(places, seed=1):
    return SeededBatches(Drawing(), Moment(seed, 0, 10, 4))[places]


def test_draws_are_a_function_of_seed_and_place():
    first = at([(3, 2), (3, 5)])
    random.seed(5)
    assert at([(3, 2), (3, 5)]).inputs == first.inputs
    assert at([(3, 5), (3, 2)]).inputs == first.inputs[::-1]
    assert at([(4, 2)]).inputs != first.inputs[:1]
    assert at([(3, 2)], seed=2).inputs != first.inputs[:1]
    assert first.indices_B.tolist() == [2, 5]
    assert first.moment == Moment(1, 3, 10, 4)


def test_loading_leaves_the_generators_alone():
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    at([(0, 0)])
    assert torch.rand(()) == expected


def test_workers_change_nothing():
    plan = plan_of(3, 2, 1, 1)
    runs = [
        list(train_batches(Drawing(), plan, [0] * 8, seed=1, rank=0, start_step=1, workers=workers))
        for workers in (0, 1)
    ]
    assert [batch.inputs for batch in runs[0]] == [batch.inputs for batch in runs[1]]
    assert [batch.moment.step for batch in runs[1]] == [1, 2]


def test_validation_samples_come_once_over_all_ranks():
    shares = [list(eval_loader(Drawing(), batch=1, rank=rank, num_ranks=3, workers=0)) for rank in range(3)]
    indices = sorted(index for share in shares for batch in share for index in batch["inputs"][0])
    assert indices == list(range(8))
