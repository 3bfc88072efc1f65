"""Numbers as people read them."""

from __future__ import annotations

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.artifact import open_artifact, write_card, write_table
from vitpipe.report.page import signed
from vitpipe.report.result_tables import (
    by_interest,
    coco_table,
    in_unit,
    is_percent,
    markdown,
    metric_label,
    metric_table,
    protocol_table,
    show,
    shown_table,
    stage_tables,
)
from vitpipe.report.results import RunResults, curves
from vitpipe.report.run_labels import labels


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1", 0.9534, "95.3 %"), ("ema_top1", 0.5, "50.0 %"), ("box_AP50", 0.2, "20.0 %"), ("mIoU", 0.31, "31.0 %"),
        ("loss", 0.03124, "0.03124"), ("params", 86.4e6, "86.4 M"), ("params", 219e3, "0.22 M"), ("params", 900.0, "0.0009 M"), ("gmacs", 4.6, "4.6 G"),
        ("images_per_second", 1234.5, "1,234"), ("num_bytes", 2.5e6, "2.5 MB"), ("num_images", 60000.0, "60,000"),
        ("loss", math.nan, "not a number"), ("loss", math.inf, "infinite"), ("wall_seconds", 65.0, "1 min 05 s"),
    ],
)  # fmt: skip
def test_metrics(name, value, text):
    assert show(name, value) == text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AP", True), ("mask_AR_small", True), ("knn_top1", True), ("loss", False), ("images", False)],
)
def test_percent(name, expected):
    assert is_percent(name) is expected


def test_published_numbers_keep_their_digits():
    assert in_unit(53.0, "percent", 1) == "53.0 %"
    assert in_unit(79, "M", 0) == "79 M"
    assert in_unit(85.526, "percent") == "85.53 %"
    assert in_unit(0.22193, "M") == "0.22 M"
    assert in_unit(86.567, "M") == "86.6 M"
    assert in_unit(None, "percent") == "—"
    assert in_unit("AdamW", "") == "AdamW"


@given(st.floats(-500, 500))
def test_a_difference_carries_its_sign(value):
    text = signed(value)
    assert text[0] == ("+" if value > 0 else "−" if value < 0 else "±")
    assert float(text[1:]) == pytest.approx(abs(value), abs=0.00501)


def test_the_twelve_coco_numbers(demo_run):
    table = coco_table(demo_run.artifacts["detect"].metrics)
    assert table is not None
    assert table.columns[1:] == ("boxes", "masks")
    assert [row[0] for row in table.rows][:3] == ["AP", "AP₅₀", "AP₇₅"]
    assert len(table.rows) == 12
    assert table.rows[0][1] == f"{100 * demo_run.artifacts['detect'].metrics['box_AP']:.1f}"
    assert coco_table({"top1": 1.0}) is None
    assert metric_table(demo_run.artifacts["detect"]) is None


def test_a_missing_coco_number_is_a_dash():
    table = coco_table({"box_AP": 0.5})
    assert table is not None
    assert [row[1] for row in table.rows] == ["50.0"] + ["—"] * 11


def test_the_stage_s_own_metric_comes_first(demo_run):
    table = metric_table(demo_run.artifacts["evaluate"])
    assert table is not None
    assert table.rows[0][0] == "top-1"


def test_metrics_come_in_the_order_of_interest():
    names = ["aAcc", "loss", "ema_mIoU", "mAcc", "extra", "mIoU", "multi_scale_mIoU"]
    found = by_interest("segment", names)
    assert found[:5] == ["mIoU", "mAcc", "aAcc", "loss", "extra"]
    assert set(found[5:]) == {"ema_mIoU", "multi_scale_mIoU"}
    assert by_interest("probe", ["knn_top1", "random_knn_top1", "linear_top1"])[0] == "linear_top1"


def test_the_figures_of_videos_are_percentages_in_their_order():
    names = ["F_mean", "J_decay", "JF_mean", "J_mean", "F_recall", "J_recall", "F_decay"]
    assert by_interest("video", names)[:3] == ["JF_mean", "J_mean", "F_mean"]
    assert all(map(is_percent, names))
    assert metric_label("JF_mean") == "J&F mean"


def test_the_cost_is_a_table_in_its_units_and_not_among_the_metrics(demo_run):
    evaluate = demo_run.artifacts["evaluate"]
    cost = next(table for table in stage_tables(evaluate) if table.name == "cost")
    assert cost.rows == (("parameters", "1.23 M", "all parameters"),)
    metrics = metric_table(evaluate)
    assert metrics is not None
    assert not {"parameters", "multiply-adds"} & {row[0] for row in metrics.rows}


def test_the_protocol_has_each_setting_once():
    rows = [
        {"metric": metric, "setting": setting, "value": value}
        for metric in ("top1", "top5")
        for setting, value in (("crop", "64"), ("of", metric))
    ]
    table = protocol_table(rows)
    assert table is not None
    assert table.rows == (("crop", "64", "all"), ("of", "top1", "top-1"), ("of", "top5", "top-5"))
    assert protocol_table([]) is None


def test_csv_tables_as_text():
    rows = [
        {"class": "a|b", "images": "1200", "top1": "0.5", "size_bytes": "2500000", "digest": "f" * 64},
        {"class": "c", "images": "7", "top1": "", "size_bytes": "0", "digest": ""},
    ]
    table = shown_table("per_class", rows)
    assert table.title == "Per class"
    assert table.columns == ("class", "images", "top-1, %", "size", "digest")
    assert table.numeric == (False, True, True, True, False)
    assert table.rows == (("a|b", "1,200", "50.0", "2.5 MB", "ffffffffffff…"), ("c", "7", "—", "0 kB", ""))
    assert "a\\|b" in markdown(table)
    assert markdown(table).splitlines()[1] == "| --- | ---: | ---: | ---: | --- |"


def test_a_table_of_thousands_shows_its_start():
    table = shown_table("classes", [{"class": f"n{i}"} for i in range(21841)])
    assert table.num_rows == 21841
    assert len(table.rows) == 300
    assert table.is_long


def test_tables_that_have_their_own_place_are_not_repeated(demo_run):
    names = {table.name for artifact in demo_run.artifacts.values() for table in stage_tables(artifact)}
    assert names == {"per_class", "cost", "classes"}


def test_classes_are_called_by_their_names(demo_run):
    table = stage_tables(demo_run.artifacts["finetune"], demo_run.class_names("finetune"))[0]
    assert [row[0] for row in table.rows][:2] == ["digit 0", "digit 1"]


def test_classes_of_other_sets_with_the_same_keys_do_not_lend_their_names(demo_run, tmp_path):
    finished = demo_run.artifacts["prepare"]
    shutil.copytree(finished.path, tmp_path / "prepare")
    own = finished.tables()["classes"]
    other = [{**row, "dataset": "svhn", "name": f"house number {row['class']}"} for row in own]
    write_table(tmp_path / "prepare", "classes", [*own, *other])
    write_card(tmp_path / "prepare", finished.card, finished.run)
    data = open_artifact(tmp_path / "prepare", "prepare")
    run = RunResults(demo_run.recipe, {**demo_run.artifacts, "prepare": data})
    assert run.class_names("evaluate") == demo_run.class_names("evaluate") != {}


def test_runs_get_short_unique_names(seed_runs, full_run):
    assert labels(seed_runs) == ["seed 0", "seed 1", "seed 2"]
    assert labels([seed_runs[0], full_run]) == ["demo", "full"]
    assert labels([full_run, full_run]) == ["itpn/pixel_base (1)", "itpn/pixel_base (2)"]


def test_curves_come_from_the_history_in_order_of_steps(demo_run):
    found = {curve.name: curve for curve in curves(demo_run.artifacts["finetune"])}
    assert set(found) == {
        "train/loss",
        "train/learning_rate",
        "train/images_per_second",
        "val/loss",
        "val/top1",
    }
    assert found["train/loss"].steps == tuple(range(10, 601, 10))
    assert curves(demo_run.artifacts["probe"]) == []
