"""Measuring during training: weights stay the same bits, points come at the stated steps and once."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import PLAN, train_digits

from vitpipe.contracts.logger import MemoryLogger


def _run(folder, every):
    logger = MemoryLogger()
    state = train_digits(folder, logger=logger, validated_every=every)
    return state, {step: value for step, name, value in logger.points if name == "val/weight"}


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_weights_and_averages_are_the_same_bits_with_and_without(tmp_path, every):
    without, none = _run(tmp_path / "without", None)
    state, points = _run(tmp_path / "with", every)
    assert not none
    expected = without.method.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.method.state_dict().items())
    assert all(torch.equal(value, without.average.shadow[k]) for k, value in state.average.shadow.items())
    assert list(points) == [
        step for step in range(1, PLAN.num_steps + 1) if step % every == 0 or step == PLAN.num_steps
    ]


def test_training_goes_on_in_training_mode(tmp_path):
    state, _ = _run(tmp_path, 2)
    assert state.method.training
