"""No credentials in the output and files of the commands: tokens in every URL and in the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CLOSED = "127.0.0.1:9"  # nothing listens there
TOKENS = [f"hunter{number}Q" for number in range(12)]
ENVIRONMENT = {
    "MLFLOW_TRACKING_URI": f"http://me:{TOKENS[0]}@{CLOSED}/?token={TOKENS[1]}",
    "MLFLOW_TRACKING_TOKEN": TOKENS[2],
    "AWS_ACCESS_KEY_ID": "me",
    "AWS_SECRET_ACCESS_KEY": TOKENS[3],
    "AWS_SESSION_TOKEN": TOKENS[4],
    "AWS_ENDPOINT_URL": f"http://me:{TOKENS[5]}@{CLOSED}",
    "AWS_DEFAULT_REGION": "here",
}
NOT_OPEN = f"https://me:{TOKENS[6]}@{CLOSED}/a.git?token={TOKENS[7]}"
INPUTS = ("own.yaml", "params.yaml")


def run(folder: Path, *command: str) -> str:
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def repo(prepared, tmp_path_factory):
    """A repository with a pushed prepared folder."""
    repo = tmp_path_factory.mktemp("secrets") / "repo"
    repo.mkdir()
    run(repo, "git", "init", "--quiet", "--initial-branch", "main")
    run(repo, "dvc", "init", "--quiet")
    run(repo, "dvc", "remote", "add", "--quiet", "--default", "storage", str(repo.parent / "storage"))
    shutil.copytree(prepared, repo / "prepared")
    run(repo, "dvc", "add", "--quiet", "prepared")
    run(repo, "dvc", "push", "--quiet")
    run(repo, "git", "add", "--all")
    run(repo, "git", "commit", "--quiet", "--message", "data")
    return repo


@pytest.fixture
def project(repo, tmp_path):
    """A folder whose recipe and params have URLs with credentials."""
    own = yaml.safe_load((ROOT / "vitpipe/recipes/itpn/pixel_base.yaml").read_text(encoding="utf-8"))
    own["source"]["url"] = f"https://paper/?token={TOKENS[8]}"
    own["stages"] = ["prepare", "report"]
    pinned = {"repo": f"file://me:{TOKENS[9]}@{repo}", "revision": "main", "path": "prepared"}
    own["data"] = {"source": "pinned", "pinned": pinned}
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    params = {"recipe": "own.yaml", "profile": "full", "overrides": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return folder


def call(project: Path, code: int, *words: str, **environment: str) -> str:
    """Run a command; no token may be in its output or in a file that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "vitpipe", *words],
        cwd=project,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    places = {f"output of {words[0]}": said.encode()}
    places |= {
        str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*") if path.is_file()
    }
    found = [
        f"{token} in {name}"
        for name, content in places.items()
        for token in TOKENS
        if name not in INPUTS and token.encode() in content
    ]
    assert not found, (found, said)
    return said


def test_listing_planning_and_compiling(project):
    assert "file://me:***@" in call(project, 0, "recipe", "own.yaml", "--profile", "full", "--json")
    assert "https://paper/?token=***" in call(project, 0, "recipe", "own.yaml", "--profile", "full")
    call(project, 0, "plan", "--json")
    call(project, 0, "plan", "--set", f"data.pinned.repo={NOT_OPEN}")
    call(project, 0, "identity")
    call(project, 0, "compile", "--dvc")
    # A package carries the values of the recipe's file, and with them what stands in its addresses.
    assert "contains credentials" in call(project, 2, "compile")
    assert "contains credentials" in call(project, 2, "compile", "--set", f"data.pinned.repo={NOT_OPEN}")
    call(project, 2, "verdict")
    call(project, 2, "plan", "--set", f"data.store=s3://me:{TOKENS[10]}@bucket/a")
    call(project, 2, "run", "prepare", "--recipe", f"https://me:{TOKENS[10]}@host/a.yaml")


CLEAN = ("--recipe", "itpn/pixel_base")


def test_submitting(project):
    endpoint = f"http://me:{TOKENS[10]}@{CLOSED}"
    assert "cannot be reached" in call(project, 1, "submit", *CLEAN, "--endpoint", endpoint, "--json")
    assert "cannot be reached" in call(project, 1, "submit", *CLEAN, KF_PIPELINES_ENDPOINT=endpoint)
    call(project, 1, "submit", *CLEAN, "--endpoint", f"http://{CLOSED}", KFP_TOKEN=TOKENS[11])
    call(project, 2, "submit", *CLEAN, "--endpoint", endpoint, KFP_TOKEN=TOKENS[11])
    for end, words in (("", "not YAML"), ("']", "contains credentials")):
        argument = f"overrides=['data.pinned.repo={NOT_OPEN}{end}"
        said = call(project, 2, "submit", *CLEAN, "--endpoint", f"http://{CLOSED}", "--argument", argument)
        assert words in said


def test_preparing(project):
    said = call(project, 2, "run", "prepare", "--set", f"data.pinned.repo={NOT_OPEN}")
    assert "The repository cannot be opened" in said
    said = call(project, 1, "run", "prepare", "--set", "data.store=s3://bucket/a")
    assert "object storage" in said
    assert "file://me:***@" in call(project, 0, "run", "prepare")
    manifest = project / "artifacts/own.yaml/full/prepare/manifest.json"
    assert "file://me:***@" in manifest.read_text(encoding="utf-8")
    call(project, 0, "run", "report")
    assert "MLflow: http" in call(project, 0, "verdict", VITPIPE_TRACKING="on")
