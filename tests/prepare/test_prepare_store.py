"""The prepare stage with shards in object storage or on a shared volume, and with a pinned revision."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import s3, s3_gate, s3_port  # noqa: F401

from vitpipe.config.data import PinnedConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import DataManifest, read_manifest
from vitpipe.data.shards import open_shards, verify_checksums
from vitpipe.datasets.dense_folder import check_dense, open_dense
from vitpipe.stages.prepare import stage as prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETS = ("imagenet", "coco")
OPTIONS = {"source": "folders", "sets": SETS, "keep_dense": "pack"}


def images(prepare_folder, split="train"):
    shards = open_shards(prepare_folder, "imagenet", split)
    return [shards.read(position) for position in range(len(shards))]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_as_prepared(folder, prepared, scratch):
    assert images(folder) == images(prepared)
    assert images(folder, "val") == images(prepared, "val")
    ours, theirs = (
        open_dense(place, "coco", scratch / name) for name, place in (("ours", folder), ("theirs", prepared))
    )
    assert (ours.digest, ours.counts) == (theirs.digest, theirs.counts)
    assert files_of(ours.root) == files_of(theirs.root)


@pytest.mark.parametrize("kind", ["s3", "volume"])
def test_only_manifests_stay_and_the_data_reads_the_same(
    kind, request, raw, prepared, make_context, tmp_path
):
    if kind == "s3":
        request.getfixturevalue("s3")
    store = "s3://shards/sets" if kind == "s3" else str(tmp_path / "volume")
    ctx = make_context(**OPTIONS, root=raw, store=store)
    metrics = prepare.run(ctx)
    assert metrics["imagenet_num_train"] == 30
    assert not list(ctx.folder.rglob("*.tar"))
    assert not list(ctx.folder.rglob("*.index"))
    assert any(f"files uploaded to {store}/imagenet/" in line for line in ctx.logger.lines)
    assert ctx.logger.tables["sources"][0]["kept_in"].startswith(store)
    same_as_prepared(ctx.folder, prepared, tmp_path)
    assert verify_checksums(ctx.folder, "imagenet") > 0
    check_dense(ctx.folder, "coco", checksums=True)


def test_a_second_run_uploads_and_packs_nothing(s3, raw, make_context, tmp_path):  # noqa: F811
    first = make_context(**OPTIONS, root=raw, store="s3://shards/sets")
    prepare.run(first)
    s3.counts.clear()
    second = type(first)(**{**vars(first), "folder": tmp_path / "second", "previous": first.folder})
    second.folder.mkdir()
    shutil.rmtree(second.state)
    second.state.mkdir()
    prepare.run(second)
    assert s3.counts["PUT"] + s3.counts["POST"] == 0
    assert not (second.state / "pack" / "imagenet" / "train.index").exists()
    assert images(second.folder) == images(first.folder)


def test_another_version_of_the_data_gets_another_folder(raw_copy, make_context, tmp_path):
    store = tmp_path / "volume"
    ctx = make_context(**OPTIONS, root=raw_copy, store=str(store))
    prepare.run(ctx)
    victim = next((raw_copy / "imagenet" / "train").rglob("*.JPEG"))
    shutil.copy(next((raw_copy / "imagenet" / "val").rglob("*.JPEG")), victim)
    second = type(ctx)(**{**vars(ctx), "folder": tmp_path / "second", "previous": ctx.folder})
    second.folder.mkdir()
    prepare.run(second)
    assert len(list((store / "imagenet").iterdir())) == 2
    assert len(list((store / "coco").iterdir())) == 1, "unchanged data is stored once"
    assert verify_checksums(ctx.folder, "imagenet") > 0, "the earlier version is untouched"


def run(folder, *command):
    if command[0] == "dvc":
        command = (str(Path(sys.executable).with_name("dvc")), *command[1:])
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(prepared, tmp_path):
    """A repository whose prepared folder DVC tracks, pushed to a local folder as remote."""
    repo = tmp_path / "repo"
    repo.mkdir()
    run(repo, "git", "init", "--quiet", "--initial-branch", "main")
    run(repo, "git", "config", "user.email", "test@example.org")
    run(repo, "git", "config", "user.name", "test")
    run(repo, "dvc", "init", "--quiet")
    run(repo, "dvc", "remote", "add", "--quiet", "--default", "storage", str(tmp_path / "storage"))
    shutil.copytree(prepared, repo / "prepared")
    run(repo, "dvc", "add", "--quiet", "prepared")
    run(repo, "dvc", "push", "--quiet")
    run(repo, "git", "add", "--all")
    run(repo, "git", "commit", "--quiet", "--message", "data")
    return repo


@pytest.mark.parametrize("on_volume", [False, True])
def test_a_pinned_revision_is_pulled_into_the_folder_or_the_volume(
    repo, prepared, make_context, tmp_path, on_volume
):
    commit = run(repo, "git", "rev-parse", "HEAD").strip()
    pinned = PinnedConfig(
        repo=str(repo), revision=commit[:10], path="prepared",
        digest=read_manifest(prepared, DataManifest).data_digest,
    )  # fmt: skip
    store = str(tmp_path / "volume") if on_volume else None
    ctx = make_context(source="pinned", pinned=pinned, store=store)
    prepare.run(ctx)
    manifest = read_manifest(ctx.folder, DataManifest)
    assert manifest.source == "pinned"
    assert manifest.revisions["imagenet"]["dvc_commit"] == commit
    assert manifest.revisions["imagenet"]["dvc_md5"].endswith(".dir")
    assert ctx.logger.tables["sources"][0]["dvc_commit"] == commit
    assert ctx.logger.datasets[0]["facts"]["dvc_commit"] == commit
    assert bool(list(ctx.folder.rglob("*.tar"))) != on_volume
    same_as_prepared(ctx.folder, prepared, tmp_path)
    if on_volume:
        assert not [path for path in Path(store).iterdir() if path.name.startswith(".")], (
            "no temporary folder is left"
        )


def test_another_digest_than_the_pinned_one_is_refused(repo, make_context):
    pinned = PinnedConfig(repo=str(repo), revision="main", path="prepared", digest="0" * 64)
    with pytest.raises(DatasetError, match="digest"):
        prepare.run(make_context(source="pinned", pinned=pinned))


def test_the_command_of_the_component_pulls_onto_the_volume(repo, prepared, tmp_path):
    """The command of a Kubeflow task with its overrides; its output has manifests only."""
    command = [
        sys.executable, "-m", "vitpipe", "run", "prepare", "--recipe", "itpn/pixel_base", "--profile", "full",
        "--set", "data.source=pinned", "--set", f"data.pinned.repo={repo}", "--set", "data.pinned.revision=main",
        "--set", "data.pinned.path=prepared", "--set", f"data.store={tmp_path / 'volume'}",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["data_revisions"]["imagenet"]["dvc_commit"] == run(repo, "git", "rev-parse", "main").strip()
    assert card["data_digest"] == read_manifest(prepared, DataManifest).data_digest
    assert not list((tmp_path / "out").rglob("*.tar"))
    same_as_prepared(tmp_path / "out", prepared, tmp_path)
