"""The same inputs give the same bytes of every file that DVC hashes, and the user's raw files are an input."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Artifact, open_artifact
from vitpipe.contracts.graph import graph_of
from vitpipe.contracts.provenance import RUN, RUN_HISTORY, UNTRACKED, is_measured
from vitpipe.data.manifest import read_listing
from vitpipe.datasets.raw_fingerprint import ABSENT, fingerprint, raw_fingerprints
from vitpipe.stages.identity import forecast, write_identities
from vitpipe.stages.run import run_stage

TINY = (
    "data.embedded.train_images=20", "data.embedded.val_images=50", "data.embedded.intermediate_images=50",
    "data.embedded.scene_train_images=4", "data.embedded.scene_val_images=2", "data.embedded.video_frames=2",
    "data.embedded.videos=1", "data.workers=0", "finetune.epochs=2", "finetune.global_batch=10",
    "finetune.log_every_steps=1", "finetune.optim.warmup_epochs=0", "evaluate.throughput_rounds=1",
)  # fmt: skip
SETS = "data.sets=[imagenet]"


def tiny(*overrides: str):
    # Prepare alone unless a test says more: a stage would need its set among data.sets.
    return load_recipe("itpn/pixel_base", "demo", (*TINY, "stages=[prepare]", *overrides))


def tracked(folder: Path) -> dict[str, str]:
    """Name -> digest of the files that DVC hashes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNTRACKED
    }


def test_prepare_of_embedded_data(tmp_path):
    recipe = tiny("data.sets=[imagenet, coco, davis]")
    for name in ("one", "two"):
        run_stage("prepare", recipe, {}, tmp_path / name)
    assert tracked(tmp_path / "one") == tracked(tmp_path / "two")
    first, second = (open_artifact(tmp_path / name) for name in ("one", "two"))
    assert first.card == second.card
    assert first.run != second.run
    assert first.run.wall_seconds > 0
    assert first.remark == ""


def test_prepare_of_a_touched_folder(tmp_path, raw_copy):
    recipe = tiny("data.source=folders", f"data.root={raw_copy}", SETS)
    run_stage("prepare", recipe, {}, tmp_path / "one")
    listing = read_listing(tmp_path / "one" / "imagenet")
    for path in raw_copy.rglob("*.JPEG"):
        os.utime(path, (1, 1))
    run_stage("prepare", recipe, {}, tmp_path / "two")
    assert read_listing(tmp_path / "two" / "imagenet") != listing
    assert tracked(tmp_path / "one") == tracked(tmp_path / "two")


@pytest.mark.slow
def test_finetune_and_evaluate(tmp_path):
    recipe = tiny(SETS, "stages=[prepare, finetune, evaluate, report]")
    data = tmp_path / "prepare"
    run_stage("prepare", recipe, {}, data)
    for name in ("one", "two"):
        run_stage("finetune", recipe, {"data": data}, tmp_path / name / "finetune")
        inputs = {"data": data, "weights": tmp_path / name / "finetune"}
        measured = run_stage("evaluate", recipe, inputs, tmp_path / name / "evaluate")
        assert measured["images_per_second"] > 0
    for stage in ("finetune", "evaluate"):
        assert tracked(tmp_path / "one" / stage) == tracked(tmp_path / "two" / stage), stage
    artifact = open_artifact(tmp_path / "one" / "evaluate")
    assert artifact.metrics["images_per_second"] > 0, "measured speeds are read back from the record"
    assert "images_per_second" not in (artifact.path / "metrics.json").read_text(encoding="utf-8")
    history = open_artifact(tmp_path / "one" / "finetune").tables()["history"]
    assert any(is_measured(row["name"]) for row in history)
    assert "per_second" not in (tmp_path / "one/finetune/tables/history.csv").read_text(encoding="utf-8")


def finished(folder: Path) -> Artifact:
    if not folder.exists():
        run_stage("prepare", tiny(SETS), {}, folder)
    return open_artifact(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("absent", ""), ("cut", "is damaged"), ("edited", "has changed"), ("of another", "belongs to another")],
)
def test_a_folder_without_a_usable_record_is_whole(tmp_path, damage, said):
    artifact = finished(tmp_path / "prepare")
    path = tmp_path / "prepare" / RUN
    text = path.read_text(encoding="utf-8")
    if damage == "absent":
        path.unlink()
    if damage == "cut":
        path.write_text(text[:40], encoding="utf-8")
    if damage == "edited":
        path.write_text(text.replace('"wall_seconds": ', '"wall_seconds": 1'), encoding="utf-8")
    if damage == "of another":
        other = tmp_path / "other"
        run_stage("prepare", tiny(SETS, "seed=9"), {}, other)
        path.write_bytes((other / RUN).read_bytes())
    again = open_artifact(tmp_path / "prepare")
    again.verify()
    assert again.card == artifact.card
    assert again.run.wall_seconds == 0
    assert said in again.remark
    assert bool(said) == bool(again.remark)


def planned(recipe, run: Path) -> dict[str, str]:
    return {item.stage: item.why for item in forecast(recipe, run) if item.runs}


def test_changes_of_raw_files_are_planned(tmp_path, raw_copy):
    recipe = tiny("data.source=folders", f"data.root={raw_copy}", SETS, "stages=[prepare]")
    run = tmp_path / "run"
    run_stage("prepare", recipe, {}, run / "prepare")
    write_identities(recipe, run / "identity")
    before = (run / "identity" / "prepare.json").read_bytes()
    assert planned(recipe, run) == {}
    image = next((raw_copy / "imagenet" / "train").rglob("*.JPEG"))
    copied = image.with_name(f"x{image.name}")
    copied.write_bytes(image.read_bytes())
    assert planned(recipe, run) == {"prepare": "the files of imagenet have changed"}
    write_identities(recipe, run / "identity")
    assert (run / "identity" / "prepare.json").read_bytes() != before
    copied.unlink()
    assert planned(recipe, run) == {}
    (raw_copy / "coco").rename(raw_copy / "elsewhere")
    assert planned(recipe, run) == {}, "only the recipe's sets count"
    (run / "prepare" / RUN).unlink()
    image.unlink()
    assert planned(recipe, run) == {}, "without a record nobody knows"


def test_fingerprints(tmp_path):
    folder = tmp_path / "imagenet" / "train" / "n1"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(b"abc")
    first = fingerprint(tmp_path)
    seen = {first}
    for change in (
        lambda: (folder / "b.JPEG").write_bytes(b""),
        lambda: (folder / "b.JPEG").rename(folder / "c.JPEG"),
        lambda: (folder / "a.JPEG").write_bytes(b"abcd"),
        lambda: os.utime(folder / "a.JPEG", (5, 5)),
        lambda: (folder / "d.JPEG").symlink_to(folder / "absent"),
    ):
        change()
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 6
    last = fingerprint(tmp_path)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert fingerprint(tmp_path) == last, "hidden files and loops do not count"
    time.sleep(0.01)
    assert fingerprint(tmp_path) == last
    assert fingerprint(tmp_path / "nothing") == ABSENT


def test_only_folders_of_the_user_have_fingerprints(tmp_path):
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "x.tar").write_bytes(b"x")
    data = tiny(
        "data.source=folders", f"data.root={tmp_path}", "data.sets=[imagenet, imagenet100, coco]"
    ).data
    found = raw_fingerprints(data)
    assert found["imagenet"] == found["imagenet100"] == fingerprint(tmp_path / "imagenet")
    assert found["coco"] == ABSENT
    assert raw_fingerprints(tiny().data) == {}
    assert set(raw_fingerprints(tiny("data.source=folders").data).values()) == {ABSENT}, "no data.root"


def test_other_stages_do_not_know_the_raw_files(tmp_path, raw_copy):
    recipe = tiny("data.source=folders", f"data.root={raw_copy}", SETS, "stages=[prepare, finetune]")
    write_identities(recipe, tmp_path / "identity")
    values = {
        node.name: json.loads((tmp_path / "identity" / f"{node.name}.json").read_text(encoding="utf-8"))
        for node in graph_of(recipe.stages)
    }
    assert set(values["prepare"]["raw_data"]) == {"imagenet"}
    assert "raw_data" not in values["finetune"]
    assert RUN_HISTORY in UNTRACKED
