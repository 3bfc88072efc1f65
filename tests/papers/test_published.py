"""The published tables can be read, and every recipe's expectation selects exactly one row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.read import load_recipe, recipe_names
from vitpipe.contracts.errors import RecipeError
from vitpipe.papers.published import find_row, papers, rows, table, tables

KEYS = {"table", "method", "variant", "dataset", "metric", "value", "unit", "setting", "source"}
COUNTS = {"itpn": 290, "revcolv2": 126, "paca": 177, "selfpatch": 111, "drloc": 233, "revcol": 49}


def test_all_rows_are_here_with_all_keys():
    assert {paper: len(rows(paper)) for paper in papers()} == COUNTS
    for paper in papers():
        for row in rows(paper):
            assert set(row) - {"flag"} == KEYS
            assert all(isinstance(row[key], str) for key in KEYS - {"value"})


def test_known_numbers():
    where = {"method": "iTPN", "variant": "HiViT-B", "metric": "mask AP"}
    setting = "pixel supervision, pre-training 1600 epochs; Mask R-CNN 1x"
    assert find_row("itpn", {**where, "setting": setting})["value"] == 46.5
    linear = {"variant": "RevColV2-L", "metric": "linear_probe_top1"}
    assert find_row("revcolv2", linear)["value"] == 79.3


@given(st.sampled_from(sorted(COUNTS)), st.data())
def test_a_row_is_found_by_its_own_keys(paper, data):
    row = data.draw(st.sampled_from(rows(paper)))
    assert find_row(paper, row) == row


def test_a_changed_result_does_not_change_the_data():
    rows("itpn")[0]["value"] = -1
    assert rows("itpn")[0]["value"] != -1


@pytest.mark.parametrize("name", recipe_names())
def test_every_expectation_of_every_recipe_selects_one_number(name):
    recipe = load_recipe(name, "full")
    for item in recipe.expect:
        assert isinstance(find_row(recipe.source.paper, item.where)["value"], int | float)


def test_no_row_names_near_misses():
    with pytest.raises(RecipeError, match="variant 'HiViT-B' instead of 'HiVit-B'"):
        find_row("itpn", {"method": "iTPN", "variant": "HiVit-B", "metric": "mIoU"})


def test_several_rows_name_what_tells_them_apart():
    with pytest.raises(RecipeError, match=r"2 published rows .* table is '.*', '.*'"):
        find_row(
            "drloc",
            {
                "variant": "Swin-T",
                "dataset": "ImageNet-100",
                "metric": "top1",
                "setting": "from scratch, 100 epochs, 224",
            },
        )


def test_a_table_has_one_set_of_columns():
    for paper in papers():
        for number, source in tables(paper).items():
            shown = table(paper, number)
            assert shown
            assert source
            assert len({tuple(row) for row in shown}) == 1
    assert len(table("itpn", "13")) == 12


@pytest.mark.parametrize(("paper", "number"), [("itpn", "99"), ("itpn", ""), ("vgg", "1")])
def test_an_unknown_table_lists_those_that_exist(paper, number):
    with pytest.raises(RecipeError, match="choose one of: "):
        table(paper, number)
