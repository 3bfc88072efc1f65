"""Learning rates compared with recorded values of the released schedules; properties of any schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.optim.schedules import learning_rate

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "itpn.json").read_text())["learning_rate"]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("steps_per_epoch", [1, 312])
def test_released_schedules(name, steps_per_epoch):
    run = GOLDEN[name]
    for epoch, expected in run["samples"].items():
        found = learning_rate(
            float(epoch) * steps_per_epoch,
            num_steps=run["epochs"] * steps_per_epoch,
            warmup_steps=run["warmup_epochs"] * steps_per_epoch,
            peak_lr=run["lr"],
            min_lr=run["min_lr"],
        )
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@st.composite
def _runs(draw):
    num_steps = draw(st.integers(1, 10_000))
    peak = draw(st.floats(1e-6, 1.0))
    return {
        "num_steps": num_steps,
        "warmup_steps": draw(st.integers(0, num_steps)),
        "peak_lr": peak,
        "min_lr": peak * draw(st.floats(0.0, 1.0)),
    }


@given(_runs(), st.floats(0.0, 1.0))
def test_rises_in_the_warm_up_falls_afterwards_and_stays_in_bounds(run, place):
    step = place * run["num_steps"]
    now = learning_rate(step, **run)
    later = learning_rate(min(step + 1, run["num_steps"]), **run)
    slack = 1e-12 * run["peak_lr"]
    assert -slack <= now <= run["peak_lr"] + slack
    if step + 1 <= run["warmup_steps"]:
        assert later >= now
    if step >= run["warmup_steps"]:
        assert later <= now + slack
        assert now >= run["min_lr"] - slack


@given(_runs())
def test_begins_at_zero_peaks_after_the_warm_up_and_ends_at_the_floor(run):
    warmup, end = run["warmup_steps"], run["num_steps"]
    assert learning_rate(0, **run) == (0.0 if warmup else run["peak_lr"])
    assert learning_rate(warmup, **run) == pytest.approx(run["peak_lr"])
    if warmup < end:
        assert learning_rate(end, **run) == pytest.approx(run["min_lr"], abs=1e-15)
