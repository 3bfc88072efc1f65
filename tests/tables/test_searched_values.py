"""A row that several variants claim, one per searched value: the best one is named as chosen."""

from __future__ import annotations

from vitpipe.report.seed_results import SeedResults
from vitpipe.tables.claims import claimed_rows
from vitpipe.tables.table_results import named_best

KEY = "finetune.optim.layer_decay"


def _result(*values, reason=""):
    return SeedResults({"unit": "percent"}, "a", "evaluate", dict(enumerate(values)), None, reason)


def test_the_best_mean_is_named():
    found = named_best(
        [KEY] * 3, [_result(80.0, 82.0), _result(83.0, 81.0, reason="other data"), _result(81.5)]
    )
    assert [item.reason for item in found] == [
        "",
        f"other data; the best of 3 searched values of {KEY}, chosen by the images that it is reported on",
        "",
    ]


def test_what_has_not_run_is_said_and_one_result_is_no_search():
    found = named_best([KEY] * 3, [_result(80.0), _result(), _result(81.0)])
    assert "best of 2 of 3 searched values" in found[2].reason
    alone = [_result(), _result(83.0)]
    assert named_best([KEY] * 2, alone) == alone
    assert named_best(["", ""], [_result(1.0), _result(2.0)])[1].reason == ""
    assert named_best([], []) == []


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
