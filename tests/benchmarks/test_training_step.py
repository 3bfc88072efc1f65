"""The benchmark of a training step: its parts against the loop that it watches, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_project import make_project, must, refused, write

from vitpipe.benchmarks.step_watch import PARTS
from vitpipe.benchmarks.training_step import StepTimes, measure_step
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import InputError, RecipeError, RunError
from vitpipe.train.average import WeightAverage

RECIPE = "itpn/pixel_base"
# The parts that every stage has; the others depend on recipe and method.
ALWAYS = ["forward", "backward", "gradient_norm", "optimiser", "other"]
TOY_RECIPE = """
summary: A method with hooks and several views
source: {paper: none, title: none}
stages: [prepare, pretrain]
data: {sets: [imagenet], embedded: {image_size: 64}}
model: {name: toy_tiny, image_size: 64, width: 12}
pretrain:
  epochs: 1
  global_batch: 16
  method: {name: two_views, crops: {global_size: 64, local_size: 32, num_local: 1}}
  optim: {base_lr: 1.0e-3}
"""


def _measured(stage: str | None = None, *overrides: str, rounds: int = 3, batch: int = 2) -> StepTimes:
    recipe = load_recipe(RECIPE, "demo", overrides)
    return measure_step(recipe, stage, batch=batch, rounds=rounds, device=torch.device("cpu"))


def test_the_parts_are_the_whole():
    times = _measured(rounds=1)
    assert (times.stage, times.method, times.num_classes) == ("pretrain", "masked_pixels", 10)
    assert [found.part for found in times.parts] == ALWAYS
    assert all(found.seconds >= found.seconds_min > 0 for found in times.parts)
    # Of a single round: medians of several need not add up.
    assert sum(found.seconds for found in times.parts) == pytest.approx(times.whole.seconds)
    assert sum(found.share for found in times.parts) == pytest.approx(1)
    assert times.images_per_second == pytest.approx(2 / times.whole.seconds)


def test_activations_grow_with_the_batch_and_hold_no_gradients():
    small, large = (_measured(rounds=1, batch=batch).activation_mib for batch in (2, 4))
    assert 1.7 < large / small < 2.1


def test_an_average_of_weights_is_a_part_where_the_recipe_has_one():
    update = WeightAverage.update
    times = _measured("finetune", "finetune.ema_decay=0.9", "finetune.optim.clip_grad_norm=1.0")
    assert [found.part for found in times.parts] == [*ALWAYS[:4], "weight_average", "other"]
    assert WeightAverage.update is update
    assert set(PARTS) >= {found.part for found in times.parts}


def test_the_labels_have_the_classes_of_the_stage():
    assert _measured("intermediate", rounds=1).num_classes == 50
    # Of a set with annotations, pre-training reads the pictures only.
    assert _measured("pretrain", "pretrain.dataset=coco", "probe.dataset=imagenet", rounds=1).num_classes == 0


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("pretrian", "There is no stage 'pretrian' (did you mean 'pretrain'?)"),
        ("probe", "in stage 'probe', which does not train by a method"),
        ("segment", "Fix: choose one of: pretrain, intermediate, finetune."),
    ],
)
def test_a_wrong_stage_is_named(stage: str, part: str):
    with pytest.raises(RecipeError) as caught:
        _measured(stage)
    assert part in str(caught.value)
    assert "Where: --stage." in str(caught.value)


def test_a_stage_that_the_recipe_lacks_is_named():
    with pytest.raises(RecipeError, match=r"stage 'intermediate', which is not in it"):
        _measured("intermediate", "stages=[prepare, pretrain, finetune]")
    with pytest.raises(RecipeError, match="has no stage that trains by a method"):
        _measured(None, "stages=[prepare]")


def test_an_own_set_needs_the_number_of_classes(tmp_path: Path):
    own = [
        "data.source=folders",
        f"data.root={tmp_path}",
        "data.own_sets={mine: classes}",
        "stages=[prepare, finetune]",
    ]
    recipe = load_recipe(RECIPE, "demo", [*own, "data.sets=[mine]", "finetune.dataset=mine"])
    cpu = torch.device("cpu")
    with pytest.raises(
        InputError, match=r"classes of 'mine' is unknown. Where: finetune.dataset. Fix: give --classes"
    ):
        measure_step(recipe, "finetune", batch=2, rounds=1, device=cpu)
    assert measure_step(recipe, "finetune", batch=2, rounds=1, device=cpu, num_classes=3).num_classes == 3


def test_a_loss_that_is_not_finite_ends_the_measurement():
    with pytest.raises(RunError, match="Loss or gradient of random images is not finite") as caught:
        _measured(None, "pretrain.optim.base_lr=1e30", "pretrain.optim.warmup_epochs=0", rounds=10)
    assert "--set pretrain.optim.base_lr=" in str(caught.value)


@pytest.mark.slow
def test_the_verb_prints_json_and_a_table(tmp_path: Path):
    short = [
        "benchmark",
        "step",
        RECIPE,
        "--profile",
        "demo",
        "--rounds",
        "2",
        "--batch",
        "2",
        "--threads",
        "1",
    ]
    found = json.loads(
        must(tmp_path, *short, "--stage", "finetune", "--set", "finetune.ema_decay=0.9", "--json")
    )
    assert (found["stage"], found["batch"], found["rounds"], found["threads"]) == ("finetune", 2, 2, 1)
    assert [part["part"] for part in found["parts"]] == [*ALWAYS[:4], "weight_average", "other"]
    assert all(part["seconds"] > 0 for part in [*found["parts"], found["whole"]])
    shown = must(tmp_path, *short)
    assert "gradient norm" in shown
    assert "images per second" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hooks_and_views_of_a_plugin(tmp_path: Path):
    make_project(tmp_path)
    write(tmp_path / "mine/recipes/lab/two.yaml", TOY_RECIPE)
    found = json.loads(
        must(tmp_path, "benchmark", "step", "lab/two", "--profile", "demo", "--rounds", "1", "--json")
    )
    assert [part["part"] for part in found["parts"]] == [*ALWAYS[:4], "hooks", "other"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["itpn/pixel_bse"], "did you mean"),
        ([RECIPE, "--stage", "detect"], "does not train by a method"),
        ([RECIPE, "--set", "pretrain.epoch=1"], "pretrain.epoch"),
        ([RECIPE, "--device", "tpu"], "This machine has no device 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(arguments: list[str], part: str, tmp_path: Path):
    assert part in refused(tmp_path, "benchmark", "step", *arguments)
