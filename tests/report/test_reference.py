"""A demo beside recorded results: the rule on its edges, and where it appears."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitpipe.config.recorded import recorded_values
from vitpipe.papers.recorded_results import Reference, ReferenceRow
from vitpipe.report import reference as module
from vitpipe.report.compare import JUDGEMENTS
from vitpipe.report.reference import (
    compared_metrics,
    comparison_of,
    counts_by_reference,
    judge_by_reference,
    printed_decimals,
)
from vitpipe.report.reference_table import notes_of, reference_cells, reference_markdown, reference_rows
from vitpipe.report.results import RunResults
from vitpipe.report.write_report import build_report, verdict_lines


def row(low=90.0, high=92.0, mean=91.0, spread=1.0, decimals=2, **changes) -> ReferenceRow:
    values = {"stage": "evaluate", "metric": "top1", "unit": "percent", "scale": 100.0, **changes}
    return ReferenceRow(decimals=decimals, mean=mean, minimum=low, maximum=high, spread=spread, **values)


@pytest.mark.parametrize(
    ("ours", "judgement"),
    [
        (91.0, "reproduced"),
        (90.0, "reproduced"),
        (92.0, "reproduced"),
        (89.99, "reproduced"),  # one unit of the last printed digit
        (92.01, "reproduced"),
        (89.989, "within noise"),
        (92.011, "within noise"),
        (88.0, "within noise"),  # three standard deviations
        (94.0, "within noise"),
        (87.999, "below"),
        (94.001, "above"),
    ],
)
def test_the_edges_belong_to_the_better_verdict(ours, judgement):
    found, reason = judge_by_reference(ours, row(), 5)
    assert found == judgement
    assert reason


@pytest.mark.parametrize(("decimals", "outside"), [(0, 1.0), (1, 0.1), (3, 0.001)])
def test_the_range_is_widened_by_one_printed_digit(decimals, outside):
    narrow = row(spread=0.0, decimals=decimals)
    assert judge_by_reference(92.0 + outside, narrow, 5)[0] == "reproduced"
    assert judge_by_reference(92.0 + 1.01 * outside, narrow, 5)[0] == "above"
    assert judge_by_reference(90.0 - outside, narrow, 5)[0] == "reproduced"
    assert judge_by_reference(90.0 - 1.01 * outside, narrow, 5)[0] == "below"


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=5),
    st.floats(0, 10),
    st.integers(0, 4),
    st.floats(-50, 150),
)
def test_the_verdict_follows_from_range_and_spread(values, spread, decimals, ours):
    low, high, mean, digit = min(values), max(values), sum(values) / len(values), 10.0**-decimals
    edges = (low - digit, high + digit, mean - 3 * spread, mean + 3 * spread)
    assume(min(abs(ours - edge) for edge in edges) > 1e-6)
    found, _ = judge_by_reference(ours, row(low, high, mean, spread, decimals), len(values))
    if low - digit < ours < high + digit:
        assert found == "reproduced"
    elif abs(ours - mean) < 3 * spread:
        assert found == "within noise"
    else:
        assert found == ("above" if ours > mean else "below")


@given(st.floats(0, 20), st.floats(0, 20), st.sampled_from([1, -1]))
def test_farther_away_is_never_better(near, far, sign):
    near, far = sorted((near, far))
    order = {"reproduced": 0, "within noise": 1, "above": 2, "below": 2}
    judged = [order[judge_by_reference(91.0 + sign * d, row(), 5)[0]] for d in (near, far)]
    assert judged == sorted(judged)


@pytest.mark.parametrize(
    ("unit", "values", "digits"),
    [
        ("percent", [91.0], 2),
        ("", [0.0312], 5),
        ("", [1.25], 3),
        ("M", [1234.5], 0),
        ("", [0.0], 2),
        ("", [1e-30], 12),
    ],
)
def test_percentages_have_two_decimals_other_numbers_four_digits(unit, values, digits):
    assert printed_decimals(unit, values) == digits


def test_references_have_expected_numbers_and_every_main_metric(demo_run):
    found = {(item.stage, item.metric): (item.unit, item.scale) for item in compared_metrics(demo_run.recipe)}
    assert found == {
        ("pretrain", "loss"): ("", 1.0),
        ("intermediate", "top1"): ("percent", 100.0),
        ("finetune", "top1"): ("percent", 100.0),
        ("probe", "linear_top1"): ("percent", 100.0),
        ("detect", "box_AP"): ("percent", 100.0),
        ("detect", "mask_AP"): ("percent", 100.0),
        ("segment", "mIoU"): ("percent", 100.0),
        ("evaluate", "top1"): ("percent", 100.0),
        ("evaluate", "params"): ("M", 1e-6),
    }


def reference_of(run: RunResults, **changes) -> Reference:
    """Results around those of a run."""
    rows = []
    for item in compared_metrics(run.recipe):
        value = run.artifacts[item.stage].metrics[item.metric] * item.scale
        rows.append(
            row(
                value - 1,
                value + 1,
                value,
                1.0,
                2,
                stage=item.stage,
                metric=item.metric,
                unit=item.unit,
                scale=item.scale,
            )
        )
    values = {
        "recipe": run.recipe.name,
        "profile": "demo",
        "seeds": (0, 1, 2, 3, 4),
        "processors": ("Toy 1",),
        "commits": ("0123456789abcdef+changes",),
        "measured_on": "2026-03-01",
        "data_digest": "da" * 32,
        "rows": tuple(rows),
        "values": recorded_values(run.recipe),
    }
    return Reference(**{**values, **changes})


@pytest.fixture
def recorded(monkeypatch):
    """Records results: `recorded(reference)`."""
    monkeypatch.setattr(module, "find_reference", lambda recipe, profile: None)
    return lambda found: monkeypatch.setattr(module, "find_reference", lambda recipe, profile: found)


def test_a_run_is_judged_by_its_recorded_results(demo_run, recorded):
    recorded(reference_of(demo_run))
    found = comparison_of(demo_run)
    assert {item.judgement for item in found.verdicts} == {"reproduced"}
    assert found.missing == ""
    assert all(item.delta == pytest.approx(0.0) for item in found.verdicts)
    assert notes_of(found) == []


def test_without_recorded_results_the_demo_says_what_to_run(demo_run, full_run, recorded):
    found = comparison_of(demo_run)
    assert found.missing == "no reference: run `make references`"
    assert {item.reason for item in found.verdicts} == {found.missing}
    assert notes_of(found) == ["itpn/pixel_base: no reference: run `make references`"]
    assert comparison_of(full_run) is None
    own = RunResults(demo_run.recipe.model_copy(update={"name": "mine/one"}), demo_run.artifacts)
    assert comparison_of(own).missing == "no reference: run `vitpipe references --recipe mine/one`"


def test_another_seed_is_compared(seed_runs, recorded):
    recorded(reference_of(seed_runs[0]))
    found = comparison_of(seed_runs[2])
    assert {item.judgement for item in found.verdicts} <= {"reproduced", "within noise", "above", "below"}


def _stages(found, judgement="not comparable") -> set[str]:
    return {item.stage for item in found.verdicts if item.judgement == judgement}


@pytest.mark.parametrize(
    ("override", "stages", "reason"),
    [
        ("detect.epochs=1", {"detect"}, "detect.epochs is 1, not 3"),
        ("finetune.epochs=1", {"finetune", "evaluate"}, "finetune.epochs is 1, not 16"),
        (
            "finetune.weights=/own.safetensors",
            {"finetune", "evaluate"},
            'finetune.weights is "/own.safetensors", not null',
        ),
        # What is logged of a stage reaches no other one.
        ("pretrain.log_every_steps=3", {"pretrain"}, "pretrain.log_every_steps is 3, not 10"),
        ("evaluate.eval_crop_ratio=0.5", {"evaluate"}, "evaluate.eval_crop_ratio is 0.5, not 1"),
    ],
)
def test_another_acting_value_is_not_comparable_and_named(demo_run, recorded, override, stages, reason):
    from vitpipe.config.read import load_recipe

    recorded(reference_of(demo_run))
    run = RunResults(load_recipe("itpn/pixel_base", "demo", [override]), demo_run.artifacts)
    found = comparison_of(run)
    assert _stages(found) == stages
    assert [(text, set(names)) for text, names in found.reasons()] == [
        (f"the recipe has other values than that of the reference: {reason}", stages)
    ]


@pytest.mark.parametrize(
    "override", ["data.workers=2", "seed=9", "report.sample_images=3", "finetune.checkpoint_minutes=1"]
)
def test_a_value_that_does_not_act_changes_nothing(demo_run, recorded, override):
    from vitpipe.config.read import load_recipe

    recorded(reference_of(demo_run))
    run = RunResults(load_recipe("itpn/pixel_base", "demo", [override]), demo_run.artifacts)
    assert _stages(comparison_of(run)) == set()


def test_another_network_or_chain_is_not_comparable(demo_run, recorded):
    from vitpipe.config.read import load_recipe

    recorded(reference_of(demo_run))
    other = load_recipe("itpn/pixel_base", "demo", ["model.decoder.depth=1"])
    assert _stages(comparison_of(RunResults(other, demo_run.artifacts))) == {
        i.stage for i in comparison_of(demo_run).verdicts
    }
    stages = [stage for stage in demo_run.recipe.stages if stage != "intermediate"]
    shorter = load_recipe("itpn/pixel_base", "demo", [f"stages=[{', '.join(stages)}]"])
    found = comparison_of(RunResults(shorter, demo_run.artifacts))
    assert _stages(found) == {"finetune", "evaluate"}
    assert found.reasons()[0][0] == (
        "the chain of finetune is prepare, pretrain, finetune; that of the reference is prepare, pretrain, intermediate, finetune"
    )


def test_own_data_are_not_comparable(demo_run, recorded):
    recorded(reference_of(demo_run, data_digest="bb" * 32))
    (only,) = comparison_of(demo_run).reasons()
    assert (
        only[0] == "the stage has read other data than the reference (digest dadadadadada, not bbbbbbbbbbbb)"
    )


def test_an_output_of_another_recipe_takes_what_comes_after_it_along(demo_run, recorded):
    recorded(reference_of(demo_run))
    run = RunResults(demo_run.recipe, demo_run.artifacts, {"pretrain": "made otherwise"})
    found = comparison_of(run)
    assert [reason for reason, _ in found.reasons()] == ["made otherwise"]
    assert _stages(found) == {item.stage for item in found.verdicts}
    late = RunResults(demo_run.recipe, demo_run.artifacts, {"evaluate": "made otherwise"})
    assert _stages(comparison_of(late)) == {"evaluate"}


def test_what_is_missing_is_the_reason(demo_run, recorded):
    whole = reference_of(demo_run)
    recorded(whole.model_copy(update={"rows": tuple(r for r in whole.rows if r.metric != "params")}))
    without = {key: value for key, value in demo_run.artifacts.items() if key != "detect"}
    reasons = {
        (item.stage, item.metric): item.reason
        for item in comparison_of(RunResults(demo_run.recipe, without)).verdicts
    }
    assert reasons["detect", "box_AP"] == "stage detect did not run"
    assert reasons["evaluate", "params"] == "params is not among the recorded results: run `make references`"


def test_a_recorded_recipe_that_cannot_be_read_any_more_says_so(demo_run, recorded):
    recorded(reference_of(demo_run, values={**recorded_values(demo_run.recipe), "former_key": 1}))
    (only,) = comparison_of(demo_run).reasons()
    assert only[0].startswith("this version cannot read the recipe that the reference was run with")


def test_a_number_that_is_none_is_not_judged(demo_run, recorded, monkeypatch):
    recorded(reference_of(demo_run))
    monkeypatch.setitem(demo_run.artifacts["segment"].metrics, "mIoU", math.nan)
    found = comparison_of(demo_run)
    assert _stages(found) == {"segment"}
    shown = next(item for item in reference_rows([found]) if item["stage"] == "segment")
    assert (shown["ours"], shown["reason"]) == ("", "mIoU is not a finite number")


def test_counts_and_rows_cover_every_verdict(demo_run, full_run, recorded):
    recorded(reference_of(demo_run))
    found = [comparison_of(demo_run), comparison_of(full_run)]
    counts = counts_by_reference(found)
    assert counts["num_reference"] == 9 == counts["num_reference_reproduced"]
    assert set(counts) == {"num_reference", *(f"num_reference_{j.replace(' ', '_')}" for j in JUDGEMENTS)}
    assert len(reference_rows(found)) == 9


def test_the_report_shows_both_comparisons(demo_run, recorded, tmp_path):
    recorded(reference_of(demo_run))
    report = build_report([demo_run], tmp_path)
    page, text = report.html.read_text(encoding="utf-8"), report.markdown.read_text(encoding="utf-8")
    cells = reference_cells(comparison_of(demo_run).verdicts[-1])
    for shown in (page, text, report.note):
        assert "seeds 0, 1, 2, 3, 4; Toy 1; commit 0123456789ab with changes; 2026-03-01" in shown
        assert cells[0] in shown
        assert cells[4] in shown
        assert "85.5 %" in shown
    assert "inside the range of 5 seeds" in text
    assert "9 of 9 demo references reproduced; 5 of 5 published rows not comparable: other data" in page
    with (tmp_path / "tables/reference.csv").open(newline="", encoding="utf-8") as handle:
        assert [item["verdict"] for item in csv.DictReader(handle)] == ["reproduced"] * 9
    assert report.metrics["num_reference_reproduced"] == 9
    # It replaces its own files.
    build_report([demo_run], tmp_path)


def test_the_report_says_that_there_is_no_reference(demo_run, full_run, recorded, tmp_path):
    report = build_report([demo_run], tmp_path / "one")
    for file in (report.html, report.markdown):
        assert "no reference: run `make references`" in file.read_text(encoding="utf-8")
    both = build_report([demo_run, full_run], tmp_path / "two")
    assert both.html.read_text(encoding="utf-8").count("no reference: run") == 1


def test_several_runs_share_a_table_that_names_the_reference_once(seed_runs, recorded, tmp_path):
    recorded(reference_of(seed_runs[0]))
    page = build_report(seed_runs, tmp_path).html.read_text(encoding="utf-8")
    assert page.count("The reference is our own recorded results") == 1
    for seed in range(3):
        assert f'<td data-label="run">seed {seed}</td>' in page


def test_parameters_have_the_same_digits_everywhere_unless_that_hides_a_difference(demo_run, recorded):
    recorded(reference_of(demo_run))
    item = next(v for v in comparison_of(demo_run).verdicts if v.metric == "params")
    numbers = {"mean": 0.22193, "minimum": 0.22193, "maximum": 0.22193, "spread": 0.0, "decimals": 4}
    row = item.row.model_copy(update=numbers)
    same = dataclasses.replace(item, ours=0.22193, row=row, judgement="reproduced")
    assert reference_cells(same)[1:6] == ("0.22 M", "0.22 M", "0.00", "0.22", "+0.00")
    other = dataclasses.replace(item, ours=0.2225, row=row, judgement="above")
    assert reference_cells(other)[1:6] == ("0.2225 M", "0.2219 M", "0.0000", "0.2219", "+0.0006")


def test_the_terminal_shows_the_reference_before_the_paper_s_rows(demo_run, recorded):
    recorded(reference_of(demo_run, data_digest="bb" * 32))
    text = "\n".join(verdict_lines([demo_run], width=120))
    assert text.index("our own reference") < text.index("85.5 %")
    assert "Not comparable (pretrain, intermediate" in text
    # The reasons are wrapped to the width.
    assert "Not comparable (evaluate top1): imagenet (embedded) has 2,000 training" in " ".join(text.split())
    recorded(None)
    assert "no reference: run `make references`" in "\n".join(verdict_lines([demo_run]))


def test_markdown_of_a_run_names_the_reason_in_its_row(demo_run, recorded):
    recorded(reference_of(demo_run))
    lines = reference_markdown(comparison_of(demo_run)).splitlines()
    assert lines[2].startswith("| metric | ours | mean | sd | range |")
    assert "**reproduced**: inside the range of 5 seeds" in lines[-1]
