"""Stage `explain`: pictures and tables of clusters and of attention, and what cannot be explained."""

from __future__ import annotations

import pytest
import torch
from tiny_shards import write_set

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import WEIGHTS, Artifact, Card
from vitpipe.contracts.errors import CheckpointError, RecipeError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.image_grid import note_of
from vitpipe.models.build import build_classifier
from vitpipe.models.weights import save_weights
from vitpipe.prepare.set_summary import read_set
from vitpipe.stages.context import StageContext
from vitpipe.stages.explain import stage
from vitpipe.train.ranks import Ranks

SETTINGS = ("data.sets=auto", "data.workers=0", "explain.images=3")
PACA = ("model.image_size=64",)
VIT = ("model={name: vit_nano, image_size: 64, patch_size: 16, clusters: null, clustering: null, "
       "assignment: null, dense_clusters: null}",)  # fmt: skip


def explained(root, name, settings, num_classes=3):
    recipe = load_recipe("paca/imagenet/tiny", "demo", (*SETTINGS, *settings))
    if not (root / "data").exists():
        write_set(root / "data", num_images=40)
    torch.manual_seed(9)
    weights = root / f"{name}-weights"
    weights.mkdir()
    save_weights(build_classifier(recipe.model, num_classes=num_classes), weights / WEIGHTS)
    words = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")
    about = {"recipe": "paca/imagenet/tiny", "profile": "demo", "parents": {}, "seed": 0, "libraries": {}}
    inputs = {
        "data": Artifact(root / "data", Card(stage="prepare", **words, **about), {}),
        "weights": Artifact(weights, Card(stage="finetune", **words, **about), {}),
    }
    folder = root / name
    folder.mkdir()
    ctx = StageContext("explain", recipe, inputs, folder, root / f"{name}-state", MemoryLogger(), Ranks())
    return stage.run(ctx), ctx


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("explain")


def test_clusters_are_pictures_and_a_table(root):
    metrics, ctx = explained(root, "clusters", PACA)
    rows = ctx.logger.tables["clusters"]
    images = list(dict.fromkeys(row["image"] for row in rows))
    assert len(images) == 3
    # One of every class, as there are three.
    assert len({row["class"] for row in rows}) == 3
    positive = [sum(r["image"] == i and r["group"] == "positive" for r in rows) / 8 for i in images]
    assert metrics["positive_share"] == pytest.approx(sum(positive) / 3)
    for image in images:
        own = [row for row in rows if row["image"] == image]
        assert sorted(row["cluster"] for row in own) == list(range(8))
        for row in own:
            assert (row["top_class"] == row["class"]) == (row["group"] == "positive")
        note = note_of(ctx.folder / f"image_{image:05d}.png")
        assert "masked by each of the 8 clusters of the first block of stage 3" in note
    assert set(ctx.logger.figures) == {f"image_{image:05d}" for image in images}


def test_a_mask_can_be_cut_and_another_stage_be_shown(root):
    _, soft = explained(root, "stage1", (*PACA, "explain.stage=1"))
    _, cut = explained(root, "cut", (*PACA, "explain.stage=1", "explain.mask=binary"))
    rows = [ctx.logger.tables["clusters"] for ctx in (soft, cut)]
    assert [len(found) for found in rows] == [48, 48]
    said = [{row["setting"]: row["value"] for row in ctx.logger.tables["protocol"]} for ctx in (soft, cut)]
    assert [found["mask"] for found in said] == ["soft", "binary, cut at 0.5"]
    assert [found["stage"] for found in said] == ["1", "1"]
    assert [r["probability"] for r in rows[0]] != [r["probability"] for r in rows[1]]


def test_weights_of_other_classes_than_the_data_s_are_refused(root):
    with pytest.raises(CheckpointError, match="tells 2 classes apart, the set 'imagenet' has 3"):
        explained(root, "fewer", PACA, num_classes=2)


def test_names_are_those_of_the_stage_s_own_set_and_told_apart(root, monkeypatch):
    """Another prepared set may have the same keys, and two classes the same name."""
    names = {"n00000000": "plum", "n00000001": "plum", "n00000002": "x" * 300}
    own = read_set(root / "data", "imagenet")
    named = own.model_copy(update={"class_names": tuple(names.values()), "classes": tuple(own.classes)})
    monkeypatch.setattr(stage, "read_set", lambda folder, name: named if name == "imagenet" else None)
    _, ctx = explained(root, "named", PACA)
    found = {row["class"] for row in ctx.logger.tables["clusters"]}
    assert found == {f"plum ({own.classes[0]})", f"plum ({own.classes[1]})", "x" * 300}


def test_a_network_without_clusters_shows_its_attention(root):
    metrics, ctx = explained(root, "attention", VIT)
    assert set(metrics) == {"probability"}
    assert len(ctx.logger.tables["images"]) == 3
    assert "how much of each patch" in note_of(ctx.folder / "attention.png")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((*PACA, "explain.stage=4"), r"explain\.stage is 4, and 'paca_nano' has clusters in \[1, 2, 3\] only"),
        ((*PACA, "explain.stage=5"), "explain.stage"),
        ((*PACA, "explain.threshold=1.0"), "explain.threshold.*less than 1"),
        ((*PACA, "model.clusters=[0, 0, 0, 0]"), "no clusters at all"),
        (("model={name: revcol_nano, image_size: 64, clusters: null, clustering: null, assignment: null, "
          "dense_clusters: null}",), "neither clusters nor attention"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("paca/imagenet/tiny", "demo", (*SETTINGS, *settings))
