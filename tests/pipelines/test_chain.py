"""The real stages, all of them, tiny: by DVC, by the compiled commands, and in containers. The numbers agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest
import yaml
from docker_double import DockerDouble
from engine_trials import PROFILE, RECIPE, TINY

from pipelines.compile import compile_pipeline
from pipelines.dvc import render_dvc
from pipelines.local import DEV_IMAGE, run_locally
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.graph import graph_of

BIN = Path(sys.executable).parent
IMAGES = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
# How fast it went is not what came out.
TIMED = {"images_per_second"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_dvc(tmp_path_factory):
    """`dvc repro` of the tiny chain: stage -> metrics."""
    folder = tmp_path_factory.mktemp("dvc")
    stages = load_recipe(RECIPE, PROFILE, TINY).stages
    (folder / "dvc.yaml").write_text(render_dvc(graph_of(stages)), encoding="utf-8")
    params = {"recipe": RECIPE, "profile": PROFILE, "overrides": list(TINY)}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    for command in (["init", "--no-scm", "--quiet"], ["repro"], ["status"]):
        done = subprocess.run(
            [BIN / "dvc", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return {stage: metrics_in(folder / "artifacts" / RECIPE / PROFILE / stage) for stage in stages}


def metrics_in(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name not in TIMED}


def run_package(tmp_path: Path, monkeypatch) -> dict[str, dict[str, float]]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    package = compile_pipeline(RECIPE, PROFILE, TINY, tmp_path / "pipeline.yaml", images=IMAGES)
    run = run_locally(package.path, root=tmp_path / "runs", development=True)
    for stage, folder in run.outputs.items():
        output = json.loads((folder.parent / "executor_output.json").read_text(encoding="utf-8"))
        card = open_artifact(folder, stage).card
        metadata = output["artifacts"]["out"]["artifacts"][0]["metadata"]
        assert (metadata["identity"], metadata["data_digest"]) == (card.identity, card.data_digest)
    assert (run.outputs["report"].parent / "report").read_text(encoding="utf-8").lstrip().startswith("<!")
    return {stage: metrics_in(folder) for stage, folder in run.outputs.items()}


def test_the_compiled_commands_give_what_dvc_gives(by_dvc, tmp_path, monkeypatch):
    double = DockerDouble()
    monkeypatch.setattr(docker, "from_env", lambda: double)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert run_package(tmp_path, monkeypatch) == by_dvc


@pytest.mark.docker
def test_containers_give_what_dvc_gives(by_dvc, real_engine, tmp_path, monkeypatch):
    assert run_package(tmp_path, monkeypatch) == by_dvc
