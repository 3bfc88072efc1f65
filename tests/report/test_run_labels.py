"""Runs are called by what they differ in, and have a mean only where they are one recipe at several seeds."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from changed_runs import with_stage

from vitpipe.config.read import load_recipe
from vitpipe.report.results import RunResults
from vitpipe.report.run_differences import results_side_by_side
from vitpipe.report.run_labels import are_seeds_of_one, labels, repetitions


@pytest.fixture(scope="module")
def run_of(make_run, tmp_path_factory):
    """A finished run of the demo with overrides."""

    def make(*overrides: str) -> RunResults:
        return make_run(tmp_path_factory.mktemp("run"), load_recipe("itpn/pixel_base", "demo", overrides))

    return make


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (["finetune.epochs=2"], ["finetune.epochs=3"], ["epochs 2", "epochs 3"]),
        (["seed=1"], ["seed=1", "finetune.epochs=3"], ["epochs 16", "epochs 3"]),
        (["seed=1"], ["finetune.epochs=3"], ["epochs 16 · seed 1", "epochs 3 · seed 0"]),
        (["pretrain.epochs=2"], ["finetune.epochs=3"], ["pretrain epochs 2 · finetune epochs 16", "pretrain epochs 5 · finetune epochs 3"]),
        (["finetune.optim.base_lr=0.1"], [], ["learning rate 0.1", "learning rate 0.002"]),
        (["model.decoder.depth=1"], [], ["depth 1", "depth 2"]),
        (["data.workers=3"], [], ["workers 3", "workers 1"]),
        ([], [], ["itpn/pixel_base (1)", "itpn/pixel_base (2)"]),
    ],
)  # fmt: skip
def test_a_label_names_what_differs(run_of, first, second, names):
    assert labels([run_of(*first), run_of(*second)]) == names


def test_a_label_with_many_differences_starts_with_the_telling_ones_and_stays_unique(run_of):
    shared = ["finetune.epochs=2", "finetune.optim.base_lr=0.1", "seed=4", "probe.neighbours=3"]
    runs = [run_of(), run_of(*shared), run_of(*shared, "detect.optim.weight_decay=0.2")]
    names = labels(runs)
    assert names[1] == "epochs 2 · learning rate 0.1 · seed 4 · weight decay 0.05 · 1 more"
    assert len(set(names)) == 3


def test_values_that_begin_alike_give_other_labels(run_of):
    runs = [run_of(f"detect.short_sides=[{','.join(map(str, range(64, 84)))},{last}]") for last in (96, 97)]
    first, second = labels(runs)
    assert first != second
    assert "(1)" not in first


def test_runs_of_equal_values_are_told_apart_by_their_data_before_they_are_numbered(run_of):
    run = other = run_of()
    for name in run.artifacts:
        other = with_stage(other, name, card={"data_digest": "be" * 32})
    assert labels([run, other]) == ["data digest dadadada", "data digest bebebebe"]
    assert not are_seeds_of_one([run, other], "pretrain")


def test_runs_with_other_values_than_the_seed_have_no_mean_where_these_act(run_of):
    runs = [run_of("finetune.epochs=2"), run_of("finetune.epochs=3", "seed=1")]
    assert not are_seeds_of_one(runs, "finetune")
    assert not are_seeds_of_one(runs, "evaluate"), "it reads the network of finetune"
    assert are_seeds_of_one(runs, "pretrain"), "the epochs of a later stage do not act on it"
    table = results_side_by_side(runs)
    assert table is not None
    means = {row[0].partition(" ")[0]: row[-1] for row in table.rows}
    assert means["finetune"] == means["evaluate"] == "—"
    assert "±" in means["pretrain"]
    assert "No mean of evaluate, finetune" in table.note


def test_what_acts_on_every_stage_leaves_no_mean_at_all(run_of):
    for change in ("model.decoder.depth=1", "data.embedded.train_images=100"):
        table = results_side_by_side([run_of(), run_of(change, "seed=1")])
        assert table is not None
        assert "mean ± sd" not in table.columns
        assert table.note.startswith("No mean: the runs differ in more than the seed")


def test_what_decides_no_result_does_not_part_seeds(run_of):
    runs = [run_of(), run_of("seed=1", "data.workers=3", "finetune.checkpoint_minutes=1")]
    assert all(are_seeds_of_one(runs, stage) for stage in runs[0].artifacts)


def test_an_output_of_other_values_than_the_run_s_is_no_seed(run_of):
    first, second = run_of(), run_of("seed=1")
    second = dataclasses.replace(second, mismatches={"pretrain": "made with other recipe values"})
    assert not are_seeds_of_one([first, second], "finetune"), "it was fed by that output"
    assert are_seeds_of_one([first, run_of("seed=1")], "finetune")


def test_the_same_seed_twice_is_a_repetition_and_has_no_mean(run_of):
    one = run_of("seed=1")
    again = with_stage(one, "finetune", metrics={"top1": 0.5})
    for runs in ([one, again], [run_of(), one, again]):
        assert not are_seeds_of_one(runs, "finetune")
        table = results_side_by_side(runs)
        assert table is not None
        assert "mean ± sd" not in table.columns
        assert "one recipe and one seed, run 2 times" in table.note
        assert repetitions(runs) == [labels(runs)[-2:]]
    assert labels([run_of(), one, again]) == ["seed 0", "seed 1 (1)", "seed 1 (2)"]


def test_seeds_of_one_recipe_have_a_mean_and_the_page_says_over_what(seed_runs):
    table = results_side_by_side(seed_runs)
    assert table is not None
    assert table.columns == ("result", "seed 0", "seed 1", "seed 2", "mean ± sd")
    assert "over the seeds 0, 1, 2 of one recipe" in table.note
    assert all("±" in row[-1] for row in table.rows)
    assert not repetitions(seed_runs)
    stages = [row[0].partition(" ")[0] for row in table.rows]
    assert len(list(itertools.groupby(stages))) == len(set(stages)), "the rows of a stage stand together"
