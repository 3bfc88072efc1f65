"""Numbers that differ look different, a run has one time on every page, and tables of runs do not interleave."""

from __future__ import annotations

import csv
import dataclasses
import re

import pytest
from changed_runs import with_stage
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Artifact, RunRecord
from vitpipe.contracts.units import format_duration
from vitpipe.papers.published import find_row
from vitpipe.report.page import write_markdown, write_page
from vitpipe.report.result_tables import in_unit, show, told_apart
from vitpipe.report.results import TOTAL_TIME, RunResults
from vitpipe.report.run_differences import difference_tables, results_side_by_side
from vitpipe.report.run_views import run_views, stage_groups
from vitpipe.report.seed_results import SeedResults
from vitpipe.report.write_report import build_report, verdict_lines


def _with_report(run: RunResults, seconds: float) -> RunResults:
    made = run.artifacts["evaluate"]
    card = made.card.model_copy(update={"stage": "report"})
    report = Artifact(made.path, card, {}, RunRecord(wall_seconds=seconds, hardware=made.run.hardware))
    return dataclasses.replace(run, artifacts={**run.artifacts, "report": report})


@given(
    st.sampled_from(["loss", "top1", "params", "gmacs", "num_bytes", "wall_seconds", "images_per_second"]),
    st.lists(st.floats(0, 1e12), min_size=1, max_size=4),
)
def test_different_numbers_look_different(name, values):
    texts = told_apart(values, lambda value, extra: show(name, value, extra))
    assert len(set(texts)) == len({repr(value) for value in values})


def test_no_more_digits_than_it_takes():
    def texts(name, *values):
        return told_apart(values, lambda value, extra: show(name, value, extra))

    assert texts("loss", 1.829, 1.85) == ["1.829", "1.85"]
    assert texts("loss", 1.82901, 1.82904) == ["1.82901", "1.82904"]
    assert texts("top1", 0.9534, 0.9531) == ["95.34 %", "95.31 %"]
    assert texts("params", 1_234_567.0, 1_234_568.0) == ["1,234,567", "1,234,568"]
    assert texts("loss", float("nan"), float("nan")) == ["not a number"] * 2


def test_results_that_differ_a_little_are_shown_with_their_difference(seed_runs):
    first, second = (
        with_stage(seed_runs[i], "finetune", metrics={"loss": 1.829 + i * 4e-6, "top1": 0.9 + i * 1e-5})
        for i in (0, 1)
    )
    table = results_side_by_side([first, second])
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["finetune loss"][:2] == ("1.829", "1.829004")
    assert rows["finetune top-1"] == ("90.000 %", "90.001 %", "90.0005 ± 0.0007 %")
    assert all(len(set(row[1:3])) == 2 for row in table.rows)


def test_times_that_look_the_same_are_left_out_and_others_stay(seed_runs):
    def timed(run: RunResults, **seconds: float) -> RunResults:
        for name, value in seconds.items():
            run = with_stage(run, name, record={"wall_seconds": value})
        return run

    runs = [
        timed(seed_runs[0], pretrain=70.01, detect=50.0),
        timed(seed_runs[1], pretrain=70.02, detect=90.0),
    ]
    (times,) = (table for table in difference_tables(runs) if table.name == "times")
    assert [row[0] for row in times.rows] == ["detect", TOTAL_TIME]


def test_seeds_of_a_table_that_differ_a_little_look_different():
    row = find_row("itpn", load_recipe("itpn/pixel_base", "demo").expect[0].where)
    found = SeedResults(row, "r", "evaluate", {0: 67.204, 1: 67.201}, None, "")
    assert found.by_seed == "seed 0: 67.204 %, seed 1: 67.201 %"
    assert in_unit(67.204, "percent") == in_unit(67.201, "percent")


def test_a_run_has_one_time_on_every_page(seed_runs, tmp_path):
    """The page that the stage writes is made before the report has a time; later pages open its folder, too."""
    by_stage, later = seed_runs[0], _with_report(seed_runs[0], 9.0)
    seconds = sum(a.run.wall_seconds for a in by_stage.artifacts.values())
    assert by_stage.total_seconds == later.total_seconds == pytest.approx(seconds)
    shown = f"{TOTAL_TIME} {format_duration(seconds)}"
    other = _with_report(seed_runs[1], 7.0)
    for number, runs in enumerate(([by_stage], [later], [later, other])):
        text = write_markdown(runs, tmp_path / f"{number}.md", {}).read_text("utf-8")
        assert shown in text
        assert any(f"{TOTAL_TIME}: {format_duration(seconds)}" in line for line in verdict_lines(runs))
    page = write_page([later], tmp_path / "one.html").read_text("utf-8")
    assert f"<dt>{TOTAL_TIME}</dt><dd>{format_duration(seconds)}</dd>" in page
    widths = [float(found) for found in re.findall(r'<span style="width: ([0-9.]+)%"', page)]
    assert sum(widths) == pytest.approx(100.0, abs=0.5)


def test_a_time_that_is_not_known_of_one_stage_gives_no_total(seed_runs):
    assert with_stage(seed_runs[0], "detect", record={"wall_seconds": 0.0}).total_seconds == 0.0


@pytest.fixture
def two_runs(make_run, tmp_path) -> list[RunResults]:
    """Two runs whose stage `finetune` has two tables that differ, and one that both have."""
    found = []
    for epochs in (2, 3):
        recipe = load_recipe("itpn/pixel_base", "demo", [f"finetune.epochs={epochs}"])
        tables = {
            ("finetune", "agreement"): [{"name": "top1", "value": 0.1 * epochs}],
            ("finetune", "per_class"): [{"class": "0", "images": 40, "top1": 0.1 * epochs}],
            ("finetune", "cost"): [{"name": "params", "value": 5, "convention": "all"}],
        }
        found.append(make_run(tmp_path / str(epochs), recipe, tables))
    return found


def test_the_same_table_of_two_runs_stands_together_with_the_names_of_the_runs(two_runs, tmp_path):
    (group,) = (found for found in stage_groups(run_views(two_runs)) if found.name == "finetune")
    shown = [(table.name, names) for names, table in group.tables]
    assert sorted(shown) == [
        ("agreement", "epochs 2"), ("agreement", "epochs 3"), ("cost", "all runs"), ("per_class", "epochs 2"),
        ("per_class", "epochs 3"),
    ]  # fmt: skip
    names = [name for name, _ in shown]
    assert names == sorted(names, key=names.index), "tables of one name stand together"


def test_the_csv_of_several_runs_says_which_run_a_row_is_of(two_runs, tmp_path):
    build_report(two_runs, tmp_path / "two")
    build_report(two_runs, tmp_path / "two")  # its own files are recognised and replaced
    for name in ("verdict", "reference"):
        with (tmp_path / "two" / "tables" / f"{name}.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        assert [row["run"] for row in rows] == ["epochs 2"] * (len(rows) // 2) + ["epochs 3"] * (
            len(rows) // 2
        )
    assert len(list((tmp_path / "two" / "figures").glob("confusion_evaluate_epochs_*.png"))) == 2


def test_the_page_of_one_run_says_what_was_set_otherwise(two_runs, tmp_path):
    assert "finetune.epochs=2" in write_page(two_runs[:1], tmp_path / "page.html").read_text("utf-8")
    text = write_markdown(two_runs[:1], tmp_path / "page.md", {}).read_text("utf-8")
    assert "other values than the recipe's: finetune.epochs=2" in text
