"""Learning rates compared with recorded values of the released schedules; properties of any schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.resolve import TrainPlan
from vitpipe.config.train_sections import OptimConfig
from vitpipe.optim.schedules import cosine, learning_rate, ramp, weight_decay

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "itpn.json").read_text())["learning_rate"]
MAE = OptimConfig(base_lr=1.0)


def _plan(num_steps=100, warmup_steps=0, peak_lr=1.0, min_lr=0.0, steps_per_epoch=10, warmup_lr=0.0):
    return TrainPlan(
        steps_per_epoch, num_steps, warmup_steps, peak_lr, min_lr, warmup_lr, 8, 8, 1, 1, "off", ()
    )


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("steps_per_epoch", [1, 312])
def test_released_schedules(name, steps_per_epoch):
    run = GOLDEN[name]
    plan = _plan(
        run["epochs"] * steps_per_epoch,
        run["warmup_epochs"] * steps_per_epoch,
        run["lr"],
        run["min_lr"],
        steps_per_epoch,
    )
    for epoch, expected in run["samples"].items():
        found = learning_rate(float(epoch) * steps_per_epoch, plan, MAE)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@st.composite
def _plans(draw):
    num_steps, peak = draw(st.integers(1, 10_000)), draw(st.floats(1e-6, 1.0))
    return _plan(num_steps, draw(st.integers(0, num_steps)), peak, peak * draw(st.floats(0.0, 1.0)))


@given(_plans(), st.floats(0.0, 1.0), st.sampled_from(["cosine", "poly", "step", "constant"]))
def test_rises_in_the_warm_up_falls_afterwards_and_stays_in_bounds(plan, place, shape):
    optim = MAE.model_copy(update={"schedule": shape, "drop_epochs": (3.0, 7.5)})
    step = place * plan.num_steps
    now = learning_rate(step, plan, optim)
    later = learning_rate(min(step + 1, plan.num_steps), plan, optim)
    slack = 1e-12 * plan.peak_lr
    assert -slack <= now <= plan.peak_lr + slack
    if step + 1 < plan.warmup_steps:
        assert later >= now
    if step >= plan.warmup_steps:
        assert later <= now + slack
        assert now >= plan.min_lr - slack


@given(_plans())
def test_begins_at_zero_peaks_after_the_warm_up_and_ends_at_the_floor(plan):
    warmup, end = plan.warmup_steps, plan.num_steps
    assert learning_rate(0, plan, MAE) == (0.0 if warmup else plan.peak_lr)
    assert learning_rate(warmup, plan, MAE) == pytest.approx(plan.peak_lr)
    if warmup < end:
        assert learning_rate(end, plan, MAE) == pytest.approx(plan.min_lr, abs=1e-15)


def test_swins_cosine_counts_from_the_start_of_the_run():
    """Warm-up of 20 of 100 epochs from 1e-6 to 1e-3, floor 1e-5: the rate after it is below the peak."""
    optim = OptimConfig(base_lr=1e-3, warmup_lr=1e-6, schedule_start="run")
    plan = _plan(1000, 200, 1e-3, 1e-5, warmup_lr=1e-6)
    assert learning_rate(0, plan, optim) == pytest.approx(1e-6)
    assert learning_rate(100, plan, optim) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(200, plan, optim) == pytest.approx(9.055e-4, rel=1e-4)
    assert learning_rate(1000, plan, optim) == pytest.approx(1e-5)


def test_dinos_warm_up_has_the_peak_in_its_last_step():
    optim = MAE.model_copy(update={"warmup_reaches_peak": True})
    rates = [learning_rate(step, _plan(10, 4), optim) for step in range(6)]
    assert rates == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0, cosine(1 / 6, 1.0, 0.0)])


def test_by_the_epoch_all_its_steps_have_the_rate_of_its_first():
    optim, plan = MAE.model_copy(update={"schedule_unit": "epoch"}), _plan(100, 20, 1.0, 0.1)
    rates = [learning_rate(step, plan, optim) for step in range(100)]
    assert len(set(rates)) == 10
    assert rates[30] == rates[39] == learning_rate(30, plan, MAE)


def test_drops_come_at_their_epochs():
    optim = MAE.model_copy(update={"schedule": "step", "drop_epochs": (8.0, 9.0), "drop_factor": 0.5})
    assert [learning_rate(step, _plan(), optim) for step in (79, 80, 90)] == [1.0, 0.5, 0.25]


def test_weight_decay_is_constant_or_follows_a_cosine():
    assert weight_decay(50, _plan(), MAE) == MAE.weight_decay
    dino = MAE.model_copy(update={"weight_decay": 0.04, "final_weight_decay": 0.4})
    found = [weight_decay(step, _plan(), dino) for step in (0, 50, 100)]
    assert found == pytest.approx([0.04, 0.22, 0.4])


def test_a_ramp_has_both_ends_and_stays():
    """DINO's temperature of the teacher: `length` values, ends included."""
    assert [ramp(i, 4, 0.04, 0.07) for i in range(6)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert ramp(0, 1, 0.04, 0.07) == ramp(0, 0, 0.04, 0.07) == 0.07
