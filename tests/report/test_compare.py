"""The verdict is what the numbers say, for any numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitpipe.config.recipe import Expectation
from vitpipe.report.comparability import Reason
from vitpipe.report.compare import (
    JUDGEMENTS,
    counts_of,
    judge,
    num_decimals,
    verdict_of,
    verdict_rows,
    verdicts_of,
)
from vitpipe.report.results import RunResults

PUBLISHED = st.one_of(
    st.integers(1, 500),
    st.integers(1, 9999).map(lambda n: n / 10),
    st.integers(1, 9999).map(lambda n: n / 100),
)
TOLERANCE = st.sampled_from([0.05, 0.2, 0.3, 0.5, 2.0])
ROW = {
    "metric": "top-1 accuracy",
    "dataset": "ImageNet-1K",
    "value": 85.5,
    "unit": "percent",
    "setting": "s",
    "source": "t",
}


def _expectation(**changes) -> Expectation:
    return Expectation(**{"stage": "evaluate", "metric": "top1", "where": {}, "tolerance": 0.2, **changes})


@given(PUBLISHED, TOLERANCE, st.floats(-20, 20))
def test_the_judgement_follows_from_the_difference(published, tolerance, delta):
    half_digit = 0.5 * 10 ** -num_decimals(published)
    assume(min(abs(abs(delta) - half_digit), abs(abs(delta) - tolerance)) > 1e-6)
    judgement, reason = judge(published + delta, published, tolerance)
    if abs(delta) < half_digit:
        expected = "reproduced"
    elif abs(delta) < tolerance:
        expected = "within noise"
    else:
        expected = "above" if delta > 0 else "below"
    assert judgement == expected
    assert reason


@given(PUBLISHED, TOLERANCE)
def test_the_edges_belong_to_the_better_verdict(published, tolerance):
    assert judge(published, published, tolerance)[0] == "reproduced"
    for sign in (1, -1):
        assert judge(published + sign * tolerance, published, tolerance)[0] in ("reproduced", "within noise")


@given(PUBLISHED, TOLERANCE, st.floats(0, 20), st.floats(0, 20))
def test_farther_away_is_never_better(published, tolerance, near, far):
    near, far = sorted((near, far))
    order = {"reproduced": 0, "within noise": 1, "above": 2}
    judged = [order[judge(published + d, published, tolerance)[0]] for d in (near, far)]
    assert judged == sorted(judged)


@pytest.mark.parametrize(("value", "digits"), [(85.5, 1), (53.0, 1), (79, 0), (0.25, 2), (1e-7, 0)])
def test_printed_digits(value, digits):
    assert num_decimals(value) == digits


@given(st.floats(allow_nan=True, allow_infinity=True), st.text(min_size=1, max_size=20))
def test_a_run_that_cannot_be_compared_gets_no_difference_but_shows_both_numbers(ours, why):
    verdict = verdict_of(_expectation(), ROW, {"top1": ours}, [Reason("other data", why)])
    wanted = why if math.isfinite(ours) else "top1 is not a finite number"
    assert (verdict.judgement, verdict.delta, verdict.reason) == ("not comparable", None, wanted)
    assert verdict.published == 85.5


@pytest.mark.parametrize(
    ("metrics", "value", "reason"),
    [
        (None, 85.5, "stage evaluate did not run"),
        ({"top5": 0.9}, 85.5, "stage evaluate did not measure top1"),
        ({"top1": math.nan}, 85.5, "top1 is not a finite number"),
        ({"top1": 0.9}, "AdamW", "the published row is not a number"),
        ({"top1": 0.9}, True, "the published row is not a number"),
    ],
)
def test_what_is_missing_is_the_reason(metrics, value, reason):
    verdict = verdict_of(_expectation(), {**ROW, "value": value}, metrics)
    assert (verdict.judgement, verdict.reason) == ("not comparable", reason)


def test_our_number_is_brought_into_the_row_s_unit():
    assert verdict_of(_expectation(), ROW, {"top1": 0.8552}).judgement == "reproduced"
    params = verdict_of(
        _expectation(metric="params", scale=1e-6, tolerance=0.5), {**ROW, "value": 79}, {"params": 78.7e6}
    )
    assert params.ours == pytest.approx(78.7)
    assert params.judgement == "reproduced"


def test_the_demo_is_not_comparable_and_says_why(demo_run):
    verdicts = verdicts_of(demo_run)
    assert verdicts
    assert {v.judgement for v in verdicts} == {"not comparable"}
    reasons = {(v.stage, v.metric): v.reason for v in verdicts}
    assert (
        "imagenet (embedded) has 2,000 training and 400 validation images of 10 classes, not 1,281,167 and"
        in (reasons["evaluate", "top1"])
    )
    assert 'model.name is "hivit_nano", not "hivit_base"' in reasons["evaluate", "params"]
    assert "training images" not in reasons["evaluate", "params"]  # which no image changes
    assert {kind for v in verdicts for kind in v.kinds} == {
        "other data",
        "other network",
        "other settings",
        "other stages",
    }
    assert all(v.ours is not None for v in verdicts)
    assert {v.published for v in verdicts} >= {85.5, 53.0}


def test_the_full_profile_is_judged_and_a_stage_that_did_not_run_is_named(full_run):
    verdicts = verdicts_of(full_run)
    assert {v.judgement for v in verdicts} <= {"above", "below"}
    assert all(v.delta == pytest.approx(v.ours - v.published) for v in verdicts)
    without = RunResults(full_run.recipe, {k: a for k, a in full_run.artifacts.items() if k != "detect"})
    reasons = {v.stage: v.reason for v in verdicts_of(without)}
    assert reasons["detect"] == "stage detect did not run"
    assert reasons["segment"] != reasons["detect"]


def test_counts_and_rows_cover_every_verdict(full_run, demo_run):
    verdicts = [*verdicts_of(full_run), *verdicts_of(demo_run)]
    counts = counts_of(verdicts)
    assert (
        counts["num_expected"]
        == len(verdicts)
        == sum(counts[f"num_{j.replace(' ', '_')}"] for j in JUDGEMENTS)
    )
    rows = verdict_rows(verdicts)
    assert len({tuple(row) for row in rows}) == 1
    assert [row["verdict"] for row in rows] == [v.judgement for v in verdicts]
    assert all(row["delta"] == "" for row in rows if row["verdict"] == "not comparable")
