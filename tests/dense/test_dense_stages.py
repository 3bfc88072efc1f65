"""Both dense stages from folders to folders, and what happens to a run that is killed, stopped or diverges."""

from __future__ import annotations

import importlib
import json
import os
import signal

import pytest
import torch
from PIL import Image

from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import DatasetError, DivergenceError, StoppedError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.dense.coco_ap import NUMBERS
from vitpipe.dense.mm_import import open_detection
from vitpipe.models.build import build_pretrainer
from vitpipe.models.weights import load_metadata, load_state, save_weights

pytestmark = [pytest.mark.dense, pytest.mark.slow]
STAGES = ("detect", "segment")
# Of one machine and one moment, not of the run.
_CLOCK = {"train/images_per_second", "train/memory_gib"}


def run_stage(context):
    return importlib.import_module(f"vitpipe.stages.{context.stage}.stage").run(context)


def points_of(logger):
    return [point for point in logger.points if point[1] not in _CLOCK]


class Undisturbed:
    """One finished run per stage, made when first asked for."""

    def __init__(self):
        self.runs = {}

    def of(self, stage, make_context):
        if stage not in self.runs:
            context = make_context(stage, "undisturbed")
            self.runs[stage] = (
                context,
                run_stage(context),
                load_state(context.folder / "weights.safetensors"),
            )
        return self.runs[stage]


@pytest.fixture(scope="module")
def undisturbed():
    return Undisturbed()


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_those_of_the_contract(undisturbed, make_context, stage):
    context, metrics, weights = undisturbed.of(stage, make_context)
    logger, folder = context.logger, context.folder
    metrics = dict(metrics)
    # Running statistics are saved, too, and are no parameters.
    assert 0 < metrics.pop("params") <= sum(tensor.numel() for tensor in weights.values())
    names = {f"{kind}_{name}" for kind in ("box", "mask") for name in NUMBERS}
    if stage == "detect":
        # In images of 64 pixels no object is medium or large for COCO: those metrics are undefined.
        assert {"box_AP", "mask_AP50", "box_AR100", "mask_AR_small"} <= set(metrics) <= names
        assert [row["metric"] for row in logger.tables["box_ap"]] == list(NUMBERS)
        assert {row["class"] for row in logger.tables["per_class"]} >= {"zero", "nine"}
    else:
        assert set(metrics) == {"mIoU", "mAcc", "aAcc"}
        assert len(logger.tables["per_class"]) == 18
    assert all(0.0 <= value <= 1.0 for value in metrics.values())
    losses = [value for _, name, value in logger.points if name == "train/loss"]
    assert losses
    assert all(value > 0 for value in losses)
    assert logger.committed_step == max(step for step, _, _ in logger.points)
    assert {name.split(".")[0] for name in weights} >= {"backbone"}
    assert "backbone.net.pyramid.lateral8.weight" in weights
    assert len(json.loads(load_metadata(folder / "weights.safetensors")["classes"])) in (10, 18)
    assert json.loads((folder / "mm_config.json").read_text())["network"]["backbone"]["task"] == stage
    with Image.open(logger.figures["predictions"]) as picture:
        assert min(picture.size) > 256


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_printed_or_written_beside_the_folders(make_context, stage, tmp_path, monkeypatch, capfd):
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    context = make_context(stage, "quiet")
    run_stage(context)
    assert list(place.iterdir()) == []
    assert {path.name for path in context.folder.iterdir()} == {
        "weights.safetensors",
        "mm_config.json",
        "predictions.png",
    }
    names = {path.name for path in context.state.rglob("*")}
    assert not names & {"mmengine.log", "mmengine", "vis_data"}
    printed = capfd.readouterr()
    assert printed.out == ""


class CrashError(Exception):
    pass


class Disturbing(MemoryLogger):
    """Does something when a step has been made."""

    def __init__(self, step, act):
        super().__init__()
        self.step, self.act = step, act

    def progress(self, step, num_steps, values):
        if step == self.step:
            self.act()


def crash():
    raise CrashError


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_and_resumed_run_ends_with_the_same_weights(undisturbed, make_context, stage):
    reference, metrics, weights = undisturbed.of(stage, make_context)
    every_step = {stage: reference.recipe.model_dump()[stage] | {"checkpoint_minutes": 1e-9}}
    recipe = type(reference.recipe)(**(reference.recipe.model_dump() | every_step))
    # The crash comes before the third step is logged and saved: it is made again.
    first = make_context(stage, "killed", Disturbing(3, crash), recipe)
    with pytest.raises(CrashError):
        run_stage(first)
    assert first.logger.committed_step == 2
    second = make_context(stage, "killed", MemoryLogger(), recipe)
    assert run_stage(second) == metrics
    assert any("after step 2" in line for line in second.logger.lines)
    resumed = load_state(second.folder / "weights.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    committed = [point for point in points_of(first.logger) if point[0] <= 2]
    assert committed + points_of(second.logger) == points_of(reference.logger)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_says_so(undisturbed, make_context, stage):
    _, metrics, _ = undisturbed.of(stage, make_context)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = make_context(stage, "stopped", Disturbing(1, terminate))
    with pytest.raises(StoppedError, match="after step 2") as caught:
        run_stage(stopped)
    assert caught.value.exit_code == 143
    assert run_stage(make_context(stage, "stopped")) == metrics


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_training_is_only_evaluated_again(undisturbed, make_context, stage, monkeypatch):
    """Killed while predicting: the trained network is taken from the state, no step is made."""
    _, metrics, _ = undisturbed.of(stage, make_context)
    module = importlib.import_module(f"vitpipe.stages.{stage}.stage")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_evaluate", lambda *given: crash())
        with pytest.raises(CrashError):
            run_stage(make_context(stage, "evaluated"))
    again = make_context(stage, "evaluated")
    assert run_stage(again) == metrics
    assert again.logger.points == []


@pytest.mark.parametrize("stage", STAGES)
def test_pretrained_pyramid_is_taken_over(make_context, stage, tiny_recipe, tmp_path):
    from dataclasses import replace

    from vitpipe.contracts.artifact import Artifact

    pretrainer = build_pretrainer(tiny_recipe.model)
    place = tmp_path / "pretrain"
    place.mkdir()
    save_weights(pretrainer, place / "weights.safetensors")
    context = make_context(stage, "transferred")
    weights = Artifact(place, context.inputs["data"].card, {})
    run_stage(replace(context, inputs={**context.inputs, "weights": weights}))
    account = context.logger.tables["weights_account"]
    taken = {row["target"] for row in account if row["outcome"] == "matched"}
    assert {"backbone.stem.proj.weight", "pyramid.fuse8.1.mlp.fc1.weight"} <= taken
    fresh = {row["target"].rpartition(".")[2] for row in account if row["outcome"] == "missing"}
    assert fresh == ({"relative_table"} if stage == "segment" else set())


def test_averaged_weights_are_saved_and_measured_too(make_context, tiny_recipe):
    section = tiny_recipe.segment.model_copy(update={"ema_decay": 0.5})
    context = make_context("segment", "average", recipe=tiny_recipe.model_copy(update={"segment": section}))
    metrics = run_stage(context)
    assert {"mIoU", "ema_mIoU"} <= set(metrics)
    assert {"per_class", "ema_per_class", "plan"} <= set(context.logger.tables)
    weights, averages = (load_state(context.folder / f"{name}.safetensors") for name in ("weights", "ema"))
    assert weights.keys() == averages.keys()
    assert any(not torch.equal(weights[name], averages[name]) for name in weights)


def test_divergence_keeps_the_batch(make_context, tiny_overrides):
    recipe = load_recipe(
        "itpn/pixel_base",
        "demo",
        (*tiny_overrides, "segment.optim.base_lr=1e30", "segment.optim.warmup_steps=0"),
    )
    context = make_context("segment", "diverged", recipe=recipe)
    with pytest.raises(DivergenceError, match="not finite") as caught:
        run_stage(context)
    (saved,) = context.state.glob("diverged-*.pt")
    assert str(saved) == caught.value.where
    content = torch.load(saved, weights_only=True)
    assert len(content["images"]) == len(content["paths"]) == len(content["indices"]) == 2
    assert content["moment"]["step"] >= 1


def test_missing_set_is_a_dataset_error(make_context, tmp_path):
    from dataclasses import replace

    from vitpipe.contracts.artifact import Artifact

    open_detection()
    context = make_context("detect", "nothing")
    nothing = Artifact(tmp_path, context.inputs["data"].card, {})
    with pytest.raises(DatasetError):
        run_stage(replace(context, inputs={"data": nothing}))
