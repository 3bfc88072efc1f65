"""Pre-training on a set without classes: the whole chain, kill and resume, a share, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from embedded_sets import TINY
from PIL import Image

from vitpipe.config.method import MethodConfig
from vitpipe.config.read import load_recipe
from vitpipe.config.set_names import sets_read
from vitpipe.contracts.artifact import WEIGHTS, Artifact, Card, read_card
from vitpipe.contracts.errors import DatasetError, RecipeError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.image_grid import note_of
from vitpipe.data.manifest import DataManifest, DenseManifest, read_digest, read_manifest, write_manifest
from vitpipe.datasets.layouts import verified
from vitpipe.datasets.stage_kinds import check_kinds
from vitpipe.models.weights import load_state
from vitpipe.prepare.dense_sets import point_dense
from vitpipe.stages import train_classifier
from vitpipe.stages.context import StageContext
from vitpipe.stages.evaluate import stage as evaluate
from vitpipe.stages.pretrain import stage as pretrain
from vitpipe.stages.probe import stage as probe
from vitpipe.stages.resolved import training_steps
from vitpipe.train.ranks import Ranks

RUN = {
    "pretrain": pretrain.run,
    "probe": probe.run,
    "finetune": train_classifier.run,
    "evaluate": evaluate.run,
}
EMBEDDED = TINY.model_dump_json()
SETTINGS = (
    "stages=[prepare, pretrain, finetune, probe, evaluate]",
    "data.sets=auto",
    f"data.embedded={EMBEDDED}",
    "data.workers=1",
    "model.image_size=32",
    "pretrain.dataset=coco",
    "pretrain.epochs=6",
    "pretrain.global_batch=2",
    "pretrain.log_every_steps=1",
    "probe.epochs=2",
)


def recipe_of(*settings: str):
    return load_recipe("itpn/pixel_base", "demo", [*SETTINGS, *settings])


def card_of(stage: str, dataset: str = "") -> Card:
    words = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")
    return Card(
        stage=stage, recipe="itpn/pixel_base", profile="demo", parents={}, seed=0, libraries={},
        dataset=dataset, **words,
    )  # fmt: skip


@dataclass
class Stages:
    """Runs stages by hand on the prepared embedded sets."""

    prepared: Path
    root: Path

    def context(self, stage: str, *settings: str, name: str = "", logger=None, weights=None) -> StageContext:
        folder = self.root / (name or stage)
        folder.mkdir(exist_ok=True)
        inputs = {"data": Artifact(self.prepared, card_of("prepare"), {})}
        if weights is not None:
            inputs["weights"] = weights
        state = self.root / f"{name or stage}.state"
        return StageContext(
            stage, recipe_of(*settings), inputs, folder, state, logger or MemoryLogger(), Ranks()
        )

    def run(self, stage: str, *settings: str, **options: Any) -> tuple[dict[str, float], StageContext]:
        ctx = self.context(stage, *settings, **options)
        return RUN[stage](ctx), ctx


@pytest.fixture
def stages(prepared, tmp_path) -> Stages:
    return Stages(prepared, tmp_path)


class CrashError(Exception):
    """Ends a stage as a kill would: nothing is saved any more."""


class Crashing(MemoryLogger):
    """Raises when the points of a step are recorded."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def metrics(self, values, step):
        if step == self.step:
            raise CrashError
        super().metrics(values, step)


def test_pretraining_reads_the_pictures_of_coco(stages):
    metrics, ctx = stages.run("pretrain")
    assert set(metrics) == {"loss", "trivial_loss"}
    logger = ctx.logger
    (row,) = [row for row in logger.tables["plan"] if row["path"] == "pretrain.num_steps"]
    assert row["value"] == 18, "6 epochs of 6 pictures, 2 at a time"
    manifest = read_manifest(stages.prepared / "coco", DenseManifest)
    assert [(used["name"], used["digest"], used["context"]) for used in logger.datasets] == [
        ("coco/train", manifest.digest, "training"),
        ("coco/val", manifest.digest, "validation"),
    ]
    assert [used["facts"]["num_images"] for used in logger.datasets] == [6, 4]
    picture = logger.figures["reconstructions"]
    with Image.open(picture) as opened:
        # The four validation pictures, although all have the same label.
        assert opened.size == (3 * 192 + 4 * 8, 24 + 4 * 192 + 5 * 8)
    assert note_of(picture).startswith("The first 4 validation images. ")
    assert [path.name for path in ctx.state.glob("data/*.tar")] == [], "nothing is copied"


def test_a_killed_and_resumed_pretraining_ends_with_the_same_weights(stages):
    metrics, whole = stages.run("pretrain", name="whole")
    often = "pretrain.checkpoint_minutes=1e-9"
    first = stages.context("pretrain", often, name="killed", logger=Crashing(7))
    with pytest.raises(CrashError):
        pretrain.run(first)
    found, second = stages.run("pretrain", often, name="killed")
    assert any("after step 6" in line for line in second.logger.lines)
    assert found == metrics
    ours, theirs = (load_state(ctx.folder / WEIGHTS) for ctx in (second, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loader_processes_and_a_users_folder_change_nothing(stages, raw, tmp_path):
    short = "pretrain.epochs=1"
    _, packed = stages.run("pretrain", short, name="packed")
    digest = point_dense(verified("coco", raw / "coco", "coco"), tmp_path / "in place" / "coco").digest
    sets = DataManifest(source="folders", sets={"coco": digest}, data_digest=digest)
    write_manifest(tmp_path / "in place", sets)
    _, in_place = Stages(tmp_path / "in place", tmp_path).run(
        "pretrain", short, "data.workers=0", name="other"
    )
    ours, theirs = (load_state(ctx.folder / WEIGHTS) for ctx in (packed, in_place))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_share_of_the_pictures_is_planned_and_read(stages):
    _, ctx = stages.run(
        "pretrain", "pretrain.train_share=0.5", "pretrain.epochs=1", "pretrain.global_batch=1"
    )
    (row,) = [row for row in ctx.logger.tables["plan"] if row["path"] == "pretrain.num_steps"]
    assert row["value"] == 3


def test_the_probe_reads_a_set_with_classes_of_its_own(stages):
    stages.run("pretrain", "pretrain.epochs=1")
    weights = Artifact(stages.root / "pretrain", card_of("pretrain", "coco"), {})
    metrics, ctx = stages.run("probe", "probe.dataset=imagenet", weights=weights)
    assert 0.0 <= metrics["linear_top1"] <= 1.0
    assert [used["name"] for used in ctx.logger.datasets] == ["imagenet/train", "imagenet/val"]
    protocol = {row["setting"]: row["value"] for row in ctx.logger.tables["protocol"]}
    assert (protocol["images"], protocol["classes"]) == ("50", "10")
    with pytest.raises(
        DatasetError, match=r"'coco' is not a set of images with classes.*`dataset` of this stage"
    ):
        stages.run("probe", weights=weights)


def test_supervised_stages_still_refuse_a_set_without_classes(stages):
    with pytest.raises(DatasetError, match=r"'coco' is not a set of images with classes.*layout of coco"):
        stages.run("finetune", "finetune.dataset=coco")
    weights = Artifact(stages.root, card_of("pretrain", "coco"), {})
    with pytest.raises(DatasetError, match="'coco' is not a set of images with classes"):
        stages.run("evaluate", weights=weights)


class LabelledConfig(MethodConfig):
    """A method of pre-training that reads labels."""

    name: Literal["labelled"] = "labelled"
    needs_classes: ClassVar[bool] = True


def test_a_method_that_needs_classes_is_refused_a_set_without(stages):
    recipe = recipe_of("probe.dataset=imagenet", "stages=[prepare, pretrain, probe]")
    section = recipe.pretrain.model_copy(update={"method": LabelledConfig()})
    recipe = recipe.model_copy(update={"pretrain": section})
    with pytest.raises(RecipeError, match="Method 'labelled' of stage 'pretrain' reads a set of images with"):
        check_kinds(recipe)
    ctx = stages.context("pretrain")
    ctx = StageContext("pretrain", recipe, ctx.inputs, ctx.folder, ctx.state, MemoryLogger(), Ranks())
    with pytest.raises(DatasetError, match="'coco' is not a set of images with classes"):
        pretrain.run(ctx)


PROBED = "stages=[prepare, pretrain, probe]"


@pytest.mark.parametrize("dataset", ["coco", "ade20k", "davis", "imagenet", "imagenet22k"])
def test_any_embedded_set_may_be_pretrained_on(dataset):
    recipe = recipe_of(PROBED, f"pretrain.dataset={dataset}", "probe.dataset=imagenet")
    check_kinds(recipe)
    assert sets_read(recipe) == {"pretrain": dataset, "probe": "imagenet"}
    assert set(recipe.data.sets) == {dataset, "imagenet"}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            [PROBED],
            r"'probe' reads a set of images with classes, but its weights were trained on 'coco', a set in the "
            r"layout of coco.*probe\.dataset.*such as imagenet",
        ),
        ([PROBED, "probe.dataset=ade20k"], r"'probe' reads .* but 'ade20k' is a set in the layout of ade20k"),
        (
            ["stages=[prepare, pretrain, evaluate]"],
            r"'evaluate' reads .* its weights were trained on 'coco'.*leave 'evaluate' out",
        ),
        (["finetune.dataset=coco", "probe.dataset=imagenet"], "'finetune' reads a set of images with classes, but"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_named_by_plan(settings, what):
    with pytest.raises(RecipeError, match=what):
        training_steps(recipe_of(*settings), 1)


def test_the_plan_of_the_papers_setting_counts_cocos_images():
    recipe = load_recipe(
        "itpn/pixel_base",
        "full",
        [
            "stages=[prepare, pretrain, probe, detect]", "data.root=/data", "pretrain.dataset=coco",
            "pretrain.global_batch=4096", "pretrain.epochs=10", "probe.dataset=imagenet10",
        ],
    )  # fmt: skip
    assert training_steps(recipe, 8)["pretrain"] == 10 * (118_287 // 4096)
    assert recipe.data.sets == ("coco", "imagenet", "imagenet10")


CHAIN = ("prepare", "pretrain", "probe", "detect", "report")
SMALLEST = (
    f"stages=[{', '.join(CHAIN)}]",
    "data.sets=auto",
    f"data.embedded={EMBEDDED}",
    "data.workers=1",
    "model.image_size=32",
    "pretrain.dataset=coco",
    "pretrain.epochs=1",
    "pretrain.global_batch=2",
    "probe.dataset=imagenet",
    "probe.epochs=2",
    "detect.global_batch=2",
    "detect.epochs=1",
    "detect.optim={warmup_steps: 1, drop_epochs: [0.5]}",
    "detect.short_sides=[64]",
    "detect.long_side=96",
    "detect.test_size=[96,64]",
    "detect.head.width=8",
    "detect.head.fc_width=16",
    "detect.head.proposals=16",
)


def vitpipe(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vitpipe", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.dense
def test_the_chain_from_coco_to_a_probe_and_back(tmp_path):
    options = ["--recipe", "itpn/pixel_base", "--profile", "demo"]
    options += [word for setting in SMALLEST for word in ("--set", setting)]
    plan = json.loads(vitpipe(tmp_path, "plan", "--json", *options))
    steps = {row["stage"]: row.get("steps") for row in plan["stages"]}
    assert (steps["pretrain"], steps["detect"]) == (3, 3)
    for stage in CHAIN:
        vitpipe(tmp_path, "run", stage, *options)
    done = tmp_path / "artifacts/itpn/pixel_base/demo"
    cards = {stage: read_card(done / stage) for stage in CHAIN}
    assert {stage: card.dataset for stage, card in cards.items() if card.dataset} == {
        "pretrain": "coco", "probe": "imagenet", "detect": "coco",
    }  # fmt: skip
    assert {cards[stage].data_digest for stage in CHAIN} == {read_digest(done / "prepare")}
    with (done / "prepare/tables/splits.csv").open(encoding="utf-8") as file:
        prepared = {(row["dataset"], row["split"]): row["num_images"] for row in csv.DictReader(file)}
    assert prepared == {
        ("imagenet", "train"): "30", ("imagenet", "val"): "50", ("coco", "train"): "6", ("coco", "val"): "4",
    }  # fmt: skip
    assert {"knn_top1", "linear_top1"} <= set(json.loads((done / "probe/metrics.json").read_text()))
    page = (done / "report/report.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in page for name in ("imagenet", "coco"))
    examined = vitpipe(tmp_path, "doctor", "--data", str(done / "prepare"))
    assert all(f"{name}: " in examined for name in ("imagenet", "coco"))
    again = json.loads(vitpipe(tmp_path, "plan", "--json", *options))
    assert {row["runs"] for row in again["stages"]} == {"cached"}
