"""`vitpipe explain`: clusters of the user's own images, from a run or a weights file, and what is refused."""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny_shards import write_set
from typer.testing import CliRunner

from vitpipe.config.read import load_recipe
from vitpipe.config.recorded import recorded_values
from vitpipe.contracts.artifact import WEIGHTS, Card, RunRecord, write_card, write_metrics
from vitpipe.contracts.errors import VitpipeError
from vitpipe.data.image_grid import note_of
from vitpipe.data.manifest import write_manifest
from vitpipe.models.build import build_classifier
from vitpipe.models.weights import save_weights
from vitpipe.verbs import explain

RECIPE = "paca/imagenet/tiny"
SETTINGS = ("data.sets=auto", "data.workers=0", "model.image_size=64")
NAMES = ("cat", "<b>dog</b>", "fish / chips")
WORDS = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of prepare and finetune, as far as the verb reads it."""
    root = tmp_path_factory.mktemp("runs") / "demo"
    recipe = load_recipe(RECIPE, "demo", SETTINGS)
    manifest = write_set(root / "prepare")
    named = manifest.model_copy(update={"class_names": NAMES})
    write_manifest(root / "prepare" / "imagenet", named)
    (root / "finetune").mkdir()
    torch.manual_seed(9)
    save_weights(build_classifier(recipe.model, num_classes=3), root / "finetune" / WEIGHTS)
    about = {"recipe": RECIPE, "profile": "demo", "parents": {}, "seed": 0, "libraries": {}}
    for stage in ("prepare", "finetune"):
        write_metrics(root / stage, {})
        record = RunRecord(values=recorded_values(recipe))
        write_card(root / stage, Card(stage=stage, **WORDS, **about), record)
    return root


@pytest.fixture
def pictures(tmp_path):
    """Two files of the same name, one of them small and with transparency."""
    for number, (folder, size, mode) in enumerate((("a", (90, 70), "RGB"), ("b", (20, 9), "RGBA"))):
        (tmp_path / folder).mkdir()
        values = np.random.default_rng(number).integers(0, 256, (*size, len(mode)), np.uint8)
        Image.fromarray(values, mode).save(tmp_path / folder / "my pet.png")
    return tmp_path


def call(*arguments: object):
    app = typer.Typer()
    explain.register(app)
    return CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)


def rows_of(folder):
    with (folder / "tables" / "clusters.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_own_images_of_any_size_are_explained(run, pictures, tmp_path):
    out = tmp_path / "out"
    done = call(run, pictures / "a", pictures / "b" / "my pet.png", "--out", out)
    assert "2 images explained" in done.output
    assert sorted(p.name for p in out.glob("*.png")) == ["000_my_pet.png", "001_my_pet.png"]
    rows = rows_of(out)
    names = [str(pictures / folder / "my pet.png") for folder in ("a", "b")]
    assert Counter(row["image"] for row in rows) == dict.fromkeys(names, 8)
    # The network's own answer stands for the class that is not known.
    assert all(row["class"] == row["whole_image_top_class"] in NAMES for row in rows)
    assert "as the network classifies it" in note_of(out / "000_my_pet.png")
    assert not list(tmp_path.glob(".out*"))


def test_a_stage_s_folder_and_a_weights_file_are_the_same_network(run, pictures, tmp_path):
    word = [str(pictures / "a")]
    call(run / "finetune", *word, "--class", "cat", "--stage", "1", "--out", tmp_path / "stage")
    chosen = ("--recipe", RECIPE, "--profile", "demo", *(w for s in SETTINGS for w in ("--set", s)))
    file = run / "finetune" / WEIGHTS
    call(file, *word, *chosen, "--class", "class 0", "--stage", "1", "--out", tmp_path / "file")
    of_stage, of_file = rows_of(tmp_path / "stage"), rows_of(tmp_path / "file")
    assert {row["class"] for row in of_stage} == {"cat"}
    assert {row["class"] for row in of_file} == {"class 0"}
    assert len(of_stage) == 16
    assert [r["probability"] for r in of_stage] == [r["probability"] for r in of_file]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage", "4"), r"has clusters in \[1, 2, 3\] only"),
        (("--class", "catt"), r"no class 'catt' \(did you mean 'cat'\?\).*3 classes"),
        (("--mask", "hard"), "--mask hard: Input should be 'soft' or 'binary'"),
        (("--recipe", RECIPE), "A run has its own recipe"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(run, pictures, tmp_path, options, words):
    with pytest.raises(VitpipeError, match=words):
        call(run, pictures / "a", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_named_and_nothing_is_written(run, pictures, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    out, good = tmp_path / "out", pictures / "a"
    with pytest.raises(VitpipeError, match=r"No image can be read from .*broken\.jpg \(no image\)"):
        call(run, good, tmp_path / "broken.jpg", "--out", out)
    (tmp_path / "empty").mkdir()
    for images, words in (("nothing.png", "does not exist"), ("empty", "no image files")):
        with pytest.raises(VitpipeError, match=words):
            call(run, tmp_path / images, "--out", out)
    with pytest.raises(VitpipeError, match="no such run"):
        call(tmp_path / "norun", good, "--out", out)
    with pytest.raises(VitpipeError, match="which recipe's network"):
        call(run / "finetune" / WEIGHTS, good, "--out", out)
    assert not out.exists()


def test_a_name_that_is_no_text_is_shown_with_its_bytes(run, pictures, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "a" / "my pet.png", odd)
    call(run, odd, "--out", tmp_path / "out")
    assert {row["image"] for row in rows_of(tmp_path / "out")} == {f"{tmp_path}/caf\\udce9.png"}
    assert "caf\\udce9.png" in note_of(tmp_path / "out" / "000_caf_.png")


def test_a_folder_with_files_of_others_is_left_alone(run, pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(VitpipeError, match="--out is not empty"):
        call(run, pictures / "a", "--out", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_a_run_without_a_classifier_says_so(tmp_path, pictures, run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepare").symlink_to(run / "prepare")
    with pytest.raises(VitpipeError, match="no output of stage finetune or intermediate"):
        call(tmp_path / "run", pictures / "a", "--out", tmp_path / "out")
