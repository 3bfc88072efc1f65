"""The training stages on a small embedded set: what they write, what they say, and the rules about weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import TABLES, WEIGHTS, Artifact, Card, write_table
from vitpipe.contracts.errors import ArtifactError, CheckpointError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.image_grid import note_of
from vitpipe.models.build import build_classifier
from vitpipe.models.weights import load_metadata, load_state, save_weights
from vitpipe.stages import train_classifier
from vitpipe.stages.context import StageContext
from vitpipe.stages.evaluate import stage as evaluate
from vitpipe.stages.prepare import stage as prepare
from vitpipe.stages.pretrain import stage as pretrain
from vitpipe.stages.probe import stage as probe
from vitpipe.train.ranks import Ranks

STAGES = {
    "prepare": prepare,
    "pretrain": pretrain,
    "intermediate": train_classifier,
    "finetune": train_classifier,
    "probe": probe,
    "evaluate": evaluate,
}
SETTINGS = (
    "stages=[prepare, pretrain, intermediate, finetune, probe, evaluate]",
    "data.sets=auto",
    "data.embedded={image_size: 32, train_images: 96, val_images: 50, intermediate_images: 96}",
    "model.image_size=32",
    "pretrain.epochs=2",
    "pretrain.global_batch=32",
    "intermediate.epochs=1",
    "intermediate.global_batch=32",
    "finetune.epochs=2",
    "finetune.global_batch=32",
    "finetune.micro_batch=16",
    "finetune.ema_decay=0.5",
    "finetune.log_every_steps=2",
    "probe.epochs=5",
    "evaluate.throughput_rounds=2",
)


class Tables(MemoryLogger):
    """Writes tables into the folder, as the tracker does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def table(self, name, rows):
        super().table(name, rows)
        write_table(self.folder, name, rows)


def _card(stage: str) -> Card:
    words = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")
    return Card(
        stage=stage, recipe="itpn/pixel_base", profile="demo", parents={}, seed=0, libraries={}, **words,
    )  # fmt: skip


class Chain:
    """Runs stages by hand, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[str, Artifact] = {}
        self.loggers: dict[str, Tables] = {}

    def run(self, stage, inputs=None, settings=(), keep=True, name=""):
        folder = self.root / (name or stage)
        folder.mkdir(parents=True, exist_ok=True)
        logger = Tables(folder)
        recipe = load_recipe("itpn/pixel_base", "demo", [*SETTINGS, *settings])
        artifacts = {k: self.done[v] for k, v in (inputs or {}).items()}
        ctx = StageContext(
            stage, recipe, artifacts, folder, self.root / f"{name or stage}.state", logger, Ranks()
        )
        metrics = STAGES[stage].run(ctx)
        if keep:
            self.done[stage] = Artifact(folder, _card(stage), metrics)
            self.loggers[stage] = logger
        return metrics, logger, folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    torch.manual_seed(0)
    chain = Chain(tmp_path_factory.mktemp("chain"))
    data = {"data": "prepare"}
    chain.run("prepare")
    chain.run("pretrain", data)
    chain.run("intermediate", {**data, "weights": "pretrain"})
    chain.run("finetune", {**data, "weights": "intermediate"})
    chain.run("probe", {**data, "weights": "pretrain"})
    chain.run("evaluate", {**data, "weights": "finetune"})
    return chain


def test_metrics_are_the_agreed_ones(chain):
    metrics = {stage: set(artifact.metrics) for stage, artifact in chain.done.items()}
    assert metrics["intermediate"] == {"top1", "top5", "loss"}
    assert metrics["finetune"] == {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"}
    assert metrics["pretrain"] == {"loss", "trivial_loss"}
    measured = ("knn_top1", "knn_top5", "linear_top1")
    assert metrics["probe"] == {f"{of}{name}" for of in ("", "random_") for name in measured}
    assert metrics["evaluate"] == {"top1", "top5", "loss", "params", "gmacs", "images_per_second"}
    for artifact in chain.done.values():
        ratios = [v for name, v in artifact.metrics.items() if "top" in name]
        assert all(0.0 <= value <= 1.0 for value in ratios)


def test_pretraining_leaves_the_whole_network_and_a_picture(chain):
    folder = chain.done["pretrain"].path
    state = load_state(folder / WEIGHTS)
    assert {name.split(".")[0] for name in state} == {"backbone", "pyramid", "decoder"}
    assert load_metadata(folder / WEIGHTS)["stage"] == "pretrain"
    picture = chain.loggers["pretrain"].figures["reconstructions"]
    assert picture.parent == folder
    with Image.open(picture) as opened:
        # Original, visible and reconstruction, of six classes' images of 32 pixels, enlarged to 192, with
        # gaps of 8 below titles of 24.
        assert opened.size == (3 * 192 + 4 * 8, 24 + 6 * 192 + 7 * 8)
    assert "first 6 classes" in note_of(picture)
    assert not chain.loggers["pretrain"].tables.get("weights_account")
    assert "Starting from random weights" in chain.loggers["pretrain"].lines


def test_points_cover_the_plan_and_are_committed(chain):
    for stage, steps in (("pretrain", 6), ("intermediate", 3), ("finetune", 6)):
        logger = chain.loggers[stage]
        assert logger.committed_step == steps
        assert max(step for step, _, _ in logger.points) == steps
        plan = {row["path"]: row["value"] for row in logger.tables["plan"]}
        assert plan[f"{stage}.num_steps"] == steps
    points = chain.loggers["finetune"].points
    assert {step for step, name, _ in points if name.startswith("train/")} == {2, 4, 6}
    # Measured on the validation images, too, after the last step in any case.
    assert max(step for step, name, _ in points if name == "val/top1") == 6


def test_fine_tuning_takes_the_backbone_and_accounts_for_every_key(chain):
    before = load_state(chain.done["pretrain"].path / WEIGHTS)
    rows = chain.loggers["intermediate"].tables["weights_account"]
    assert {row["source"] for row in rows} - {""} == set(before)
    after = load_state(chain.done["intermediate"].path / WEIGHTS)
    assert {row["target"] for row in rows} - {""} == set(after)
    outcomes = {row["target"] or row["source"]: row["outcome"] for row in rows}
    assert outcomes["backbone.stem.proj.weight"] == "matched"
    assert outcomes["head.weight"] == "missing"
    assert outcomes["decoder.mask_token"] == "unused"
    heads = {r["target"]: r["outcome"] for r in chain.loggers["finetune"].tables["weights_account"]}
    assert heads["head.weight"] == "fresh"
    assert heads["head_norm.weight"] == "matched"


def test_classifiers_know_their_classes_and_the_average_lies_beside(chain):
    for stage, num_classes in (("intermediate", 50), ("finetune", 10)):
        path = chain.done[stage].path / WEIGHTS
        assert load_state(path)["head.weight"].shape[0] == num_classes
        assert len(json.loads(load_metadata(path)["classes"])) == num_classes
    weights, average = (load_state(chain.done["finetune"].path / f) for f in (WEIGHTS, "ema.safetensors"))
    assert weights.keys() == average.keys()
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    assert not (chain.done["intermediate"].path / "ema.safetensors").exists()


def test_tables_per_class(chain):
    with (chain.done["finetune"].path / TABLES / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert sum(int(row["images"]) for row in rows) == 50
    hits = sum(float(row["top1"]) * int(row["images"]) for row in rows)
    assert hits / 50 == pytest.approx(chain.done["finetune"].metrics["top1"])


def test_the_independent_measurement_agrees(chain):
    tuned, measured = chain.done["finetune"].metrics, chain.done["evaluate"].metrics
    for name in ("top1", "top5", "loss"):
        assert measured[name] == pytest.approx(tuned[name], rel=1e-5)
    tables = chain.loggers["evaluate"].tables
    assert [row["metric"] for row in tables["agreement"]] == ["top1", "top5", "loss"]
    assert all(abs(row["difference"]) < 1e-5 for row in tables["agreement"])
    assert sum(row["images"] for row in tables["confusion"]) == 50
    assert {row["name"] for row in tables["cost"]} >= {"params", "macs"}
    state = load_state(chain.done["finetune"].path / WEIGHTS)
    assert measured["params"] == sum(tensor.numel() for tensor in state.values())
    assert measured["gmacs"] > 0
    assert measured["images_per_second"] > 0


def test_a_disagreement_is_said(chain):
    claimed = {**chain.done["finetune"].metrics, "top1": 0.999}
    honest = chain.done["finetune"]
    chain.done["finetune"] = Artifact(honest.path, honest.card, claimed)
    try:
        _, logger, _ = chain.run(
            "evaluate", {"data": "prepare", "weights": "finetune"}, keep=False, name="doubt"
        )
    finally:
        chain.done["finetune"] = honest
    assert any("0.9990 in finetune" in line for line in logger.lines)


def test_the_probe_does_not_change_what_it_measures_and_repeats(chain):
    metrics, _, folder = chain.run(
        "probe", {"data": "prepare", "weights": "pretrain"}, keep=False, name="again"
    )
    assert metrics == chain.done["probe"].metrics
    assert not (folder / WEIGHTS).exists()


def test_the_users_own_weights_win(chain, tmp_path):
    torch.manual_seed(5)
    recipe = load_recipe("itpn/pixel_base", "demo", SETTINGS)
    own = build_classifier(recipe.model, num_classes=10)
    save_weights(own, tmp_path / "own.safetensors")
    short = [
        f"finetune.weights={tmp_path}/own.safetensors",
        "finetune.epochs=0.34",
        "finetune.ema_decay=null",
    ]
    still = ["finetune.optim.base_lr=1e-12", "finetune.optim.min_lr=0.0", "finetune.optim.weight_decay=0.0"]
    _, logger, folder = chain.run(
        "finetune",
        {"data": "prepare", "weights": "intermediate"},
        [*short, *still],
        keep=False,
        name="own",
    )
    assert any("own.safetensors" in line for line in logger.lines)
    assert {row["outcome"] for row in logger.tables["weights_account"]} == {"matched"}
    after = load_state(folder / WEIGHTS)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bits(chain):
    for stage in ("pretrain", "finetune"):
        inputs = {"data": "prepare"} | ({"weights": "intermediate"} if stage == "finetune" else {})
        metrics, _, folder = chain.run(stage, inputs, keep=False, name=f"{stage}-again")
        assert metrics == chain.done[stage].metrics
        first, second = load_state(chain.done[stage].path / WEIGHTS), load_state(folder / WEIGHTS)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_another_model_are_refused_before_anything_runs(chain, tmp_path):
    recipe = load_recipe("itpn/pixel_base", "demo", [*SETTINGS, "model.name=hivit_base"])
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in build_classifier(recipe.model, num_classes=2).state_dict().items()}
    save_weights(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "base.safetensors",
    )
    with pytest.raises(CheckpointError) as caught:
        chain.run(
            "finetune",
            {"data": "prepare"},
            [f"finetune.weights={tmp_path}/base.safetensors"],
            keep=False,
            name="other",
        )
    assert "hivit_base" in str(caught.value)
    assert list((chain.root / "other").iterdir()) == []


def test_a_network_that_cannot_classify_is_refused(chain):
    with pytest.raises(CheckpointError, match="cannot classify"):
        chain.run("evaluate", {"data": "prepare", "weights": "pretrain"}, keep=False, name="blind")


def test_weights_that_are_not_there(chain):
    bare = chain.root / "bare"
    bare.mkdir()
    chain.done["bare"] = Artifact(bare, _card("pretrain"), {})
    with pytest.raises(ArtifactError, match="holds no weights"):
        chain.run("finetune", {"data": "prepare", "weights": "bare"}, keep=False, name="none")
