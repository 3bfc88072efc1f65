"""Rows, recipes and seeds become runs; what is shared runs once; numbers stand beside the paper's."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest

from vitpipe.contracts.errors import ArtifactError, InputError, RecipeError, StoppedError
from vitpipe.report.run_labels import labels
from vitpipe.stages.folder_lock import locked_folders
from vitpipe.stages.report.stage import results_of_folder
from vitpipe.tables.run_table import Progress, planned_stages, run_table
from vitpipe.tables.table_plan import plan_table
from vitpipe.tables.table_results import command_of, table_report

PLAIN, SMOOTH = "toy/cells/plain", "toy/cells/smooth"
# By hand: two variants by two seeds; one packing, pre-training per seed, and only plain is measured.
WORK = [
    (PLAIN, 0, "prepare"),
    (PLAIN, 0, "pretrain"),
    (PLAIN, 0, "finetune"),
    (PLAIN, 0, "evaluate"),
    (PLAIN, 1, "pretrain"),
    (PLAIN, 1, "finetune"),
    (PLAIN, 1, "evaluate"),
    (SMOOTH, 0, "finetune"),
    (SMOOTH, 1, "finetune"),
]


def run(**options) -> tuple[Progress, dict]:
    plan = plan_table("toy", "1", options.pop("profile", "size"), **options)
    progress = Progress(0, {})
    run_table(plan, lambda line: None, progress)
    report = table_report(plan, progress.failures)
    return progress, {(item.row["variant"], item.row["metric"]): item for item in report.results}


def test_shared_stages_run_once_and_a_second_call_runs_nothing(toy, fake):
    progress, _ = run(num_seeds=2)
    assert fake.calls == WORK
    assert progress.num_stages == len(WORK)
    assert run(num_seeds=2)[0].num_stages == 0
    assert fake.calls == WORK


def test_mean_and_sample_standard_deviation_stand_beside_the_published_row(toy, fake):
    _, found = run(num_seeds=2)
    plain, params = found["plain", "top1"], found["plain", "params"]
    # Seeds 0 and 1 give 60 and 61 percent: mean 60.5, and sqrt(0.5 ** 2 + 0.5 ** 2) = 0.7071 over n - 1 = 1.
    assert plain.mean == pytest.approx(60.5)
    assert plain.spread == pytest.approx(0.70710678)
    assert (plain.ours, plain.published) == ("60.50 ± 0.71 %", "60.0 %")
    assert plain.values == {0: pytest.approx(60.0), 1: pytest.approx(61.0)}
    assert (plain.judgement, plain.verdict.delta) == ("above", pytest.approx(0.5))
    assert found["smooth", "top1"].mean == pytest.approx(70.5)
    # A count is the same at every seed.
    assert (params.ours, params.judgement) == ("2.04 M", "reproduced")
    assert found["other", "top1"].reason == "no recipe claims this row"


def test_the_first_seed_lies_where_a_single_run_has_it(toy, fake):
    run(num_seeds=2)
    folder = Path("artifacts") / PLAIN
    assert (folder / "size/finetune/card.json").is_file()
    assert (folder / "size-seed1/finetune/card.json").is_file()
    assert not (folder / "size-seed1/prepare").exists()


def test_more_seeds_add_only_their_own_stages(toy, fake):
    run(num_seeds=1)
    before = len(fake.calls)
    _, found = run(num_seeds=2)
    assert fake.calls[before:] == [call for call in WORK if call[1] == 1]
    assert len(found["plain", "top1"].values) == 2


def test_a_stage_that_has_run_for_another_row_is_taken_from_there(toy, fake):
    run(conditions=["variant=smooth"])
    assert fake.calls == [(SMOOTH, 0, stage) for stage in ("prepare", "pretrain", "finetune")]
    run(conditions=["metric=params"])
    # Packing and pre-training of the other variant are the same work.
    assert fake.calls[3:] == [(PLAIN, 0, "finetune"), (PLAIN, 0, "evaluate")]


def test_rows_that_were_not_asked_for_still_show_what_is_finished(toy, fake):
    run()
    _, found = run(conditions=["variant=smooth"])
    assert found["plain", "top1"].mean == pytest.approx(60.0)
    assert found["plain", "top1"].spread is None


def test_a_failing_row_does_not_stop_the_others(toy, fake):
    fake.broken = {(PLAIN, "finetune")}
    progress, found = run(num_seeds=2)
    assert set(progress.failures) == {f"{PLAIN}, seed 0", f"{PLAIN}, seed 1"}
    assert found["smooth", "top1"].mean == pytest.approx(70.5)
    assert found["plain", "top1"].mean is None
    assert "seed 0: stage finetune failed" in found["plain", "top1"].reason
    # What would read the failed stage is not tried.
    assert (PLAIN, 0, "evaluate") not in fake.calls
    fake.broken.clear()
    before = len(fake.calls)
    assert not run(num_seeds=2)[0].failures
    assert [call for call in fake.calls[before:] if call[0] == SMOOTH] == []


def test_a_failed_shared_stage_is_tried_once_and_fails_every_row_that_needs_it(toy, fake):
    fake.broken = {(PLAIN, "pretrain")}
    progress, _ = run()
    assert fake.calls == [(PLAIN, 0, "prepare"), (PLAIN, 0, "pretrain")]
    assert set(progress.failures) == {f"{PLAIN}, seed 0", f"{SMOOTH}, seed 0"}


def test_an_interrupt_says_how_to_go_on_and_loses_nothing(toy, fake):
    fake.interrupted_at = (PLAIN, "evaluate")
    with pytest.raises(StoppedError, match="the same command goes on") as caught:
        run(num_seeds=2)
    assert caught.value.exit_code == 128 + signal.SIGINT
    stopped = len(fake.calls)
    run(num_seeds=2)
    assert fake.calls[stopped:] == WORK[3:]


def test_a_changed_recipe_value_runs_what_reads_it(toy, fake):
    run()
    before = len(fake.calls)
    run(overrides=["finetune.drop_path=0.05"])
    again = fake.calls[before:]
    assert again == [(PLAIN, 0, "finetune"), (PLAIN, 0, "evaluate"), (SMOOTH, 0, "finetune")]


def test_a_damaged_output_is_not_reused(toy, fake):
    run()
    before = len(fake.calls)
    metrics = Path("artifacts") / SMOOTH / "size/finetune/metrics.json"
    metrics.write_text(metrics.read_text().replace("0.7", "0.9"))
    run()
    assert fake.calls[before:] == [(SMOOTH, 0, "finetune")]


def test_a_result_that_does_not_fit_the_plan_is_no_result(toy, fake, monkeypatch):
    plan = plan_table("toy", "1", "size", conditions=["variant=smooth"])
    recipe = toy / "recipes/toy/cells.yaml"
    # The recipe is edited while the table runs.
    recipe.write_text(recipe.read_text().replace("label_smoothing: 0.2", "label_smoothing: 0.3"))
    progress = Progress(0, {})
    run_table(plan, lambda line: None, progress)
    assert "have changed since" in progress.failures[f"{SMOOTH}, seed 0"].message


def test_two_calls_do_not_run_one_table(toy, fake):
    plan = plan_table("toy", "1", "size")
    with (
        locked_folders(plan.folder),
        pytest.raises(ArtifactError, match="Another process makes the table toy/1"),
    ):
        run()
    assert fake.calls == []


def test_the_plan_says_what_runs_what_is_shared_and_what_is_there(toy, fake):
    rows = planned_stages(plan_table("toy", "1", "size", num_seeds=2))
    runs = [(row["run"], row["stage"]) for row in rows if row["does"] == "runs"]
    assert runs == [(f"{name}, seed {seed}", stage) for name, seed, stage in WORK]
    # 40 images in batches of 20, one epoch.
    assert {row["steps"] for row in rows if row["stage"] == "pretrain" and row["does"] == "runs"} == {2}
    shared = {(row["run"], row["stage"]): row["folder"] for row in rows if row["does"] == "shared"}
    assert shared[f"{SMOOTH}, seed 1", "pretrain"] == f"artifacts/{PLAIN}/size-seed1/pretrain"
    run()
    rows = planned_stages(plan_table("toy", "1", "size"))
    assert {row["does"] for row in rows} == {"finished"}


def test_what_cannot_be_planned(toy):
    with pytest.raises(RecipeError, match="did you mean 'toy'"):
        plan_table("toyy", "1", "size")
    with pytest.raises(RecipeError, match="There is no table '9' of toy"):
        plan_table("toy", "9", "size")
    with pytest.raises(RecipeError, match="did you mean 'size'"):
        plan_table("toy", "1", "sizes")
    with pytest.raises(InputError, match=r"No recipe claims a row of toy/2.*run one of: toy/1"):
        plan_table("toy", "2", "size")
    with pytest.raises(InputError, match=r"No row is left by 'variant=plan'.*plain, smooth, other"):
        plan_table("toy", "1", "size", conditions=["variant=plan"])
    with pytest.raises(InputError, match=r"not of the form KEY=VALUE.*variant"):
        plan_table("toy", "1", "size", conditions=["smooth"])


def test_the_command_can_be_typed(toy):
    plan = plan_table("toy", "1", "size", num_seeds=3, overrides=["data.root=/my data"])
    assert command_of(plan) == "vitpipe table toy/1 --run --profile size --seeds 3 --set 'data.root=/my data'"


def test_at_demo_size_every_row_says_why_it_is_not_comparable(toy, fake):
    _, found = run(profile="demo")
    assert found["plain", "top1"].judgement == "not comparable"
    assert found["plain", "top1"].reason == "imagenet (embedded) is not among the prepared sets"
    assert found["plain", "top1"].mean == pytest.approx(60.0)


@pytest.fixture
def call(toy, fake, capsys, monkeypatch):
    """`vitpipe table ...` in this process, without engines: exit code, stdout."""
    from typer.testing import CliRunner

    # Another test of this process may have mounted them.
    monkeypatch.setattr("vitpipe.verbs.table._compilers", [])

    from vitpipe.cli import app

    return lambda *arguments: CliRunner().invoke(app, ["table", *arguments])


def test_the_verb_writes_terminal_markdown_csv_and_page(call, fake):
    done = call("toy/1", "--run", "--profile", "size", "--seeds", "2")
    assert done.exit_code == 0, done.output
    for part in ("60.50 ± 0.71 %", "no recipe", "1 row: no recipe claims this row", PLAIN):
        assert part in done.stdout
    folder = Path("artifacts/tables/toy-1/size")
    with (folder / "table.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["variant"], row["ours_mean"], row["ours_sd"], row["num_seeds"]) for row in rows] == [
        ("plain", "60.5", "0.7071", "2"),
        ("smooth", "70.5", "0.7071", "2"),
        ("plain", "2.04", "0.0", "2"),
        ("other", "", "", "0"),
    ]
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert (
        "| toy, plain | top1, digits | 60.0 % | 60.50 ± 0.71 % | 2 | +0.5 | above | toy/cells/plain |" in text
    )
    assert "`vitpipe table toy/1 --run --profile size --seeds 2`" in text
    assert "toy/cells/plain, seed 0 and 3 more" in text  # the packed data serve all four runs
    page = (folder / "table.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 1 + 4 + 1 + len(WORK)
    assert "60.50 ± 0.71 %" in page
    assert "seed 0: 60 %, seed 1: 61 %" in page
    assert "<div><dt>rows</dt><dd>4</dd></div>" in page


def test_the_runs_of_a_table_can_be_reported_on_side_by_side(toy, fake):
    run(num_seeds=2)
    found = [results_of_folder(Path("artifacts") / PLAIN / name) for name in ("size", "size-seed1")]
    assert labels(found) == ["seed 0", "seed 1"]


def test_json_is_json_only_and_a_failure_is_exit_code_1(call, fake):
    fake.broken = {(SMOOTH, "finetune")}
    done = call("toy/1", "--run", "--profile", "size", "--json")
    assert done.exit_code == 1
    shown = json.loads(done.stdout)
    assert shown["rows"][0]["ours_mean"] == 60.0
    assert shown["rows"][0]["ours_sd"] == ""
    assert shown["failures"] == [
        f"{SMOOTH}, seed 0, stage finetune: The loss is not finite "
        "(log: artifacts/tables/toy-1/size/logs/toy_cells_smooth-seed0-finetune.log)"
    ]


def test_a_profile_with_real_data_is_planned_and_not_started(call, fake):
    done = call("toy/1", "--run", "--profile", "big", "--json")
    assert done.exit_code == 0, done.output
    assert fake.calls == []
    assert {item["does"] for item in json.loads(done.stdout)["stages"]} == {"runs", "shared"}
    done = call("toy/1", "--run", "--profile", "big")
    assert "Nothing was started" in done.stdout
    assert "--yes" in done.stdout
    assert call("toy/1", "--run", "--profile", "size", "--plan").exit_code == 0
    assert fake.calls == []
    assert call("toy/1", "--run", "--profile", "big", "--yes").exit_code == 0
    assert fake.calls


def test_a_plan_that_suits_no_cluster_is_still_shown(call, fake, monkeypatch):
    def refuse(plan):
        raise RecipeError("eight ranks cannot share it", where="pretrain.global_batch", fix="use fewer")

    monkeypatch.setattr("vitpipe.verbs.table._compilers", [refuse])
    done = call("toy/1", "--run", "--profile", "big", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["package"] == ""
    assert "No Kubeflow package: eight ranks cannot share it" in " ".join(done.stderr.split())
    assert fake.calls == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["toy/1", "--run", "--seeds", "0"], "greater than or equal to 1"),
        (["toy/1", "--row", "variant=plain"], "add --run"),
        (["toy/1", "--yes"], "add --run"),
    ],
)
def test_options_that_make_no_sense(call, arguments, part):
    done = call(*arguments)
    assert done.exit_code == 2
    assert part in done.output.replace("\n", " ").replace("│", " ")


def test_a_file_of_somebody_else_is_not_replaced(call, fake, toy):
    mine = Path("artifacts/tables/toy-1/size/table.md")
    mine.parent.mkdir(parents=True)
    mine.write_text("my notes")
    done = call("toy/1", "--run", "--profile", "size")
    assert "files that are not an earlier table (table.md)" in str(done.exception)
    assert mine.read_text() == "my notes"
    shutil.rmtree(mine.parent)
    assert call("toy/1", "--run", "--profile", "size").exit_code == 0
