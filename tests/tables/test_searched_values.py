"""A row that several variants claim, one per searched value: the best one is named as chosen."""

from __future__ import annotations

import pytest

from vitpipe.report.seed_results import SeedResults
from vitpipe.tables.claims import claimed_rows
from vitpipe.tables.table_results import _searched, named_best

KEY = "finetune.optim.layer_decay"


def _result(*values, reason=""):
    return SeedResults({"unit": "percent"}, "a", "evaluate", dict(enumerate(values)), None, reason)


def _decays(*values):
    return [(KEY, value) for value in values]


def test_the_best_mean_is_named_with_the_values_that_were_tried():
    results = [_result(80.0, 82.0), _result(83.0, 81.0, reason="other data"), _result(81.5)]
    found = named_best(_decays(0.45, 0.5, 0.55), results)
    assert [item.reason for item in found] == [
        "",
        f"other data; the best of 3 searched values of {KEY} (0.5 of 0.45, 0.5, 0.55), "
        "chosen by the images that it is reported on",
        "",
    ]


def test_what_has_not_run_is_said_and_one_result_is_no_search():
    found = named_best(_decays(0.45, 0.5, 0.55), [_result(80.0), _result(), _result(81.0)])
    assert f"best of 2 of 3 searched values of {KEY} (0.55 of 0.45, 0.55)" in found[2].reason
    alone = [_result(), _result(83.0)]
    assert named_best(_decays(0.45, 0.5), alone) == alone
    assert named_best([("", None), ("", None)], [_result(1.0), _result(2.0)])[1].reason == ""
    assert named_best([], []) == []


@pytest.mark.parametrize("value", [None, 0.5])
def test_one_value_for_all_is_no_search(value):
    """A profile may take the value out: the variants are then one run."""
    found = named_best(_decays(value, value, value), [_result(80.0), _result(81.0), _result(80.0)])
    assert [item.reason for item in found] == ["", "", ""]


def test_the_clip_rows_of_itpn_are_claimed_by_all_three_values():
    rows = [row for row in claimed_rows("itpn", "repository-1", "full", ["data.root=."]) if row.claims]
    clip = [
        row
        for row in rows
        if row.published["metric"] == "top-1 accuracy" and "CLIP" in str(row.published["setting"])
    ]
    assert len(clip) == 5
    for row in clip:
        decays = {claim.recipe.finetune.optim.layer_decay for claim in row.claims}
        assert len(decays) == len(row.claims) == 3
        assert {claim.expectation.searched for claim in row.claims} == {KEY}


@pytest.mark.parametrize(
    ("table", "sizes"), [("8", {"HiViT-B", "HiViT-L"}), ("10", {"HiViT-B", "HiViT-L/14", "HiViT-L/16"})]
)
def test_a_table_of_settings_is_run_as_the_rows_that_have_them(table, sizes):
    rows = claimed_rows("itpn", table, "full", ["data.root=."])
    assert {row.published["variant"] for row in rows} == sizes
    assert {row.published["metric"] for row in rows} == {"top-1 accuracy"}
    assert {row.published["table"] for row in rows} == {"repository-1"}
    for row in rows:
        # Every value that is searched, once.
        assert len({claim.recipe.finetune.optim.layer_decay for claim in row.claims}) == len(row.claims) == 3
        assert all(table in claim.expectation.settings for claim in row.claims)


def test_a_table_with_numbers_of_its_own_is_not_run_as_settings():
    rows = claimed_rows("itpn", "repository-2", "full", ["data.root=."])
    assert {row.published["table"] for row in rows} == {"repository-2"}


def test_the_value_of_a_recipe_is_that_of_its_searched_key():
    row = next(row for row in claimed_rows("itpn", "8", "full", ["data.root=."]))
    assert [_searched(claim) for claim in row.claims] == [(KEY, 0.45), (KEY, 0.5), (KEY, 0.55)]
    demo = next(row for row in claimed_rows("itpn", "8", "demo"))
    assert {_searched(claim) for claim in demo.claims} == {(KEY, None)}
