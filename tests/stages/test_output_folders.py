"""Nothing of the user's is replaced: every place is checked before the work, whatever its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Card, open_artifact, write_card, write_metrics, writing
from vitpipe.contracts.errors import ArtifactError
from vitpipe.stages.output_folders import check_output_folders, check_result_folder

CARD = Card(
    stage="prepare", recipe="r", profile="demo", recipe_digest="a", data_digest="b", code_digest="c", image="train",
    identity="d", parents={}, seed=0, libraries={},
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder and a home folder, as people have them."""
    folder = tmp_path / "home" / "work"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    return folder


@pytest.fixture
def recipe(here):
    for name in ("imagenet", "coco"):
        (here / "data" / name / "train").mkdir(parents=True)
        (here / "data" / name / "train" / "a.jpg").write_bytes(b"an image")
    (here / "own.safetensors").write_bytes(b"weights")
    return load_recipe(
        "itpn/pixel_base", "demo",
        (f"data.root={here / 'data'}", "data.sets=[imagenet, coco]", "data.source=folders",
         "stages=[prepare, finetune, detect]",
         f"data.store={here / 'volume'}", f"finetune.weights={here / 'own.safetensors'}"),
    )  # fmt: skip


def output(folder, stage="prepare"):
    """A finished output of a stage."""
    with writing(folder) as partial:
        write_metrics(partial, {"x": 1.0})
        write_card(partial, CARD.model_copy(update={"stage": stage}))
    return folder


def everything(folder):
    """All names and contents below a folder."""
    return {
        str(path): path.read_bytes()
        if path.is_file()
        else str(path.readlink())
        if path.is_symlink()
        else None
        for path in sorted(folder.rglob("*"))
    }


def refused(here, recipe, out, state=None, stage="prepare", inputs=None):
    """Settling is refused in one paragraph, and nothing has changed anywhere."""
    before = everything(here.parent)
    with pytest.raises(ArtifactError, match="nothing was touched") as caught:
        check_output_folders(stage, recipe, inputs or {}, here / out, here / state if state else None)
    assert everything(here.parent) == before
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("option", ["out", "state"])
@pytest.mark.parametrize(
    "place",
    [".", "..", "/", "../..", "data", "data/imagenet", "data/imagenet/train", "data/coco/new/deep", "volume",
     "volume/new", "own.safetensors", "given", "given/inside", "link-to-data", "data/../data", "own.safetensors/x"],
)  # fmt: skip
def test_places_that_hold_what_is_read_or_everything(here, recipe, option, place):
    output(here / "given")
    (here / "link-to-data").symlink_to(here / "data")
    places = {"out": "new", "state": "new-state"} | {option: place}
    assert f"--{option}" in refused(here, recipe, **places, inputs={"data": here / "given"})


@pytest.mark.parametrize(
    "place", ["new", "artifacts/a/b", "empty", "data/other", "data/other/deep", "../beside"]
)
def test_places_that_are_free(here, recipe, place):
    (here / "empty").mkdir()
    places = check_output_folders("prepare", recipe, {}, here / place, None)
    assert places.out == (here / place).resolve()
    assert places.state == places.out.with_name(f".{places.out.name}.state")


def test_a_folder_with_other_files(here, recipe):
    (here / "notes").mkdir()
    (here / "notes" / "thesis.txt").write_text("years")
    assert "thesis.txt" in refused(here, recipe, "notes")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"), writing(here / "notes"):
        raise AssertionError("must not begin")
    assert (here / "notes" / "thesis.txt").read_text() == "years"


def test_a_file_put_into_an_output_is_not_replaced_with_it(here, recipe):
    output(here / "out")
    (here / "out" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(here, recipe, "out")
    (here / "out" / "notes.txt").unlink()
    (here / "out" / ".DS_Store").write_text("")
    check_output_folders("prepare", recipe, {}, here / "out", None)


def test_the_output_of_another_stage(here, recipe):
    output(here / "out", "pretrain")
    assert "'pretrain'" in refused(here, recipe, "out", stage="finetune")


def test_our_own_output_of_any_version_may_be_replaced(here, recipe):
    output(here / "out")
    text = (here / "out" / "card.json").read_text()
    for version in ('"schema_version": 1', '"schema_version": 99'):
        (here / "out" / "card.json").write_text(text.replace('"schema_version": 3', version))
        check_output_folders("prepare", recipe, {}, here / "out", None)


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"stage": "x"}'])
def test_a_card_json_of_somebody_else_is_no_mark(here, recipe, text):
    (here / "out").mkdir()
    (here / "out" / "card.json").write_text(text)
    refused(here, recipe, "out")


@pytest.mark.parametrize("inside", ["new/state", "new", "."])
def test_the_state_is_not_the_output(here, recipe, inside):
    refused(here, recipe, "new", state=inside)


def test_a_link_is_followed_each_time(here, recipe):
    (here / "disk").mkdir()
    (here / "out").symlink_to(here / "disk" / "result")
    for number in (1.0, 2.0):
        places = check_output_folders("prepare", recipe, {}, here / "out", None)
        assert places.out == here / "disk" / "result"
        with writing(here / "out") as folder:
            write_metrics(folder, {"x": number})
            write_card(folder, CARD)
        assert (here / "out").is_symlink()
        assert open_artifact(here / "out").metrics == {"x": number}
    assert sorted(path.name for path in (here / "disk").iterdir()) == ["result"]


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_the_names_used_meanwhile_may_be_somebody_else_s_too(here, name):
    (here / name).mkdir()
    (here / name / "mine").write_text("x")
    with pytest.raises(ArtifactError, match="mine"), writing(here / "out"):
        raise AssertionError("must not begin")
    assert (here / name / "mine").read_text() == "x"


def test_a_kill_between_the_two_renames_loses_nothing(here):
    output(here / "out")
    (here / "out").rename(here / ".out.replaced")
    with pytest.raises(KeyError), writing(here / "out"):
        raise KeyError
    assert open_artifact(here / "out").metrics == {"x": 1.0}


def test_what_a_killed_stage_left_is_cleared(here):
    (here / ".out.partial").mkdir()
    (here / ".out.partial" / ".being-written-by-vitpipe").touch()
    (here / ".out.partial" / "half").write_text("x")
    output(here / "out")
    assert sorted(path.name for path in here.iterdir()) == ["out"]
    assert sorted(path.name for path in (here / "out").iterdir()) == ["card.json", "metrics.json", "run.json"]


def test_a_card_of_version_1_is_read_and_one_of_a_later_version_named(here):
    output(here / "out")
    path = here / "out" / "card.json"
    values = json.loads(path.read_text())
    del values["card_sha256"], values["files"]
    old = {"schema_version": 1, "git_commit": "e", "hardware": {"num_cores": 2}, "started_at": "now",
           "wall_seconds": 1.5, "tracking_run": "", "notes": []}  # fmt: skip
    path.write_text(json.dumps(values | old))
    artifact = open_artifact(here / "out")
    assert artifact.metrics == {"x": 1.0}
    assert (artifact.run.git_commit, artifact.run.wall_seconds) == ("e", 1.5)
    path.write_text(json.dumps(values | {"schema_version": 4}))
    with pytest.raises(ArtifactError, match="version 4"):
        open_artifact(here / "out")


@pytest.mark.parametrize("file", ["metrics.json", "card.json"])
def test_a_flipped_bit_in_an_output_is_found(here, file):
    output(here / "out")
    path = here / "out" / file
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError):
            open_artifact(here / "out")


@pytest.mark.parametrize("option", ["--out", "--state"])
@pytest.mark.parametrize("kind", ["root", "loop", "inside a file"])
def test_paths_that_cannot_be_folders(here, recipe, option, kind):
    (here / "loop").symlink_to(here / "loop")
    (here / "file").write_text("mine")
    place = {"root": Path("/"), "loop": here / "loop", "inside a file": here / "file" / "below"}[kind]
    out, state = (place, None) if option == "--out" else (here / "out", place)
    with pytest.raises(ArtifactError, match=f"{option} .*nothing was touched"):
        check_output_folders("prepare", recipe, {}, out, state)


@pytest.mark.parametrize("ending", ["partial", "replaced"])
def test_a_foreign_folder_at_a_temporary_place_is_refused_before_anything_is_written(here, recipe, ending):
    (here / f".out.{ending}").mkdir()
    (here / f".out.{ending}" / "thesis.txt").write_text("mine")
    before = everything(here)
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        check_output_folders("prepare", recipe, {}, here / "out", None)
    assert everything(here) == before


def test_a_stage_s_output_is_no_state(here, recipe):
    output(here / "made")
    with pytest.raises(ArtifactError, match="--state is a stage's output"):
        check_output_folders("prepare", recipe, {}, here / "out", here / "made")


@pytest.mark.parametrize("place", ["made", "made/tables", ".", "/"])
def test_files_of_a_verb_never_land_in_an_output(here, place):
    output(here / "made")
    before = everything(here)
    with pytest.raises(ArtifactError, match="nothing was touched"):
        check_result_folder("--out", here / place)
    assert everything(here) == before
    assert check_result_folder("--out", here / "page") == here / "page"
