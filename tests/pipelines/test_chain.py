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
from shared_folder import shared_folder

from pipelines.compile import compile_pipeline
from pipelines.dvc import render_dvc
from pipelines.local import DEV_IMAGE, LocalOptions, run_locally
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.graph import graph_of

BIN = Path(sys.executable).parent
IMAGES = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
# How fast it went is not what came out.
TIMED = {"images_per_second"}

# Each chain is nine processes that import torch: minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """`dvc repro` of the tiny chain: the folder of its outputs."""
    return shared_folder(tmp_path_factory, "dvc-chain", _run_by_dvc) / "artifacts" / RECIPE / PROFILE


def _run_by_dvc(folder: Path) -> None:
    stages = load_recipe(RECIPE, PROFILE, TINY).stages
    (folder / "dvc.yaml").write_text(render_dvc(graph_of(stages)), encoding="utf-8")
    params = {"recipe": RECIPE, "profile": PROFILE, "overrides": list(TINY)}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment.pop("VITPIPE_TRACKING", None)
    for command in (["init", "--no-scm", "--quiet"], ["repro"], ["status"]):
        done = subprocess.run(
            [BIN / "dvc", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def by_dvc(chain):
    """Stage -> metrics of that chain."""
    stages = load_recipe(RECIPE, PROFILE, TINY).stages
    return {stage: metrics_in(chain / stage) for stage in stages}


def metrics_in(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name not in TIMED}


def run_package(tmp_path: Path, monkeypatch) -> dict[str, dict[str, float]]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    package = compile_pipeline(RECIPE, PROFILE, TINY, tmp_path / "pipeline.yaml", images=IMAGES)
    run = run_locally(package.path, LocalOptions(development=True), root=tmp_path / "runs")
    messages = run.folder / "kubeflow"
    for stage, folder in run.outputs.items():
        output = json.loads((messages / stage / "executor_output.json").read_text(encoding="utf-8"))
        card = open_artifact(folder, stage).card
        metadata = output["artifacts"]["out"]["artifacts"][0]["metadata"]
        assert (metadata["identity"], metadata["data_digest"]) == (card.identity, card.data_digest)
    assert (messages / "report" / "report").read_text(encoding="utf-8").lstrip().startswith("<!")
    return {stage: metrics_in(folder) for stage, folder in run.outputs.items()}


def test_the_compiled_commands_give_what_dvc_gives(by_dvc, tmp_path, monkeypatch):
    double = DockerDouble()
    monkeypatch.setattr(docker, "from_env", lambda: double)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert run_package(tmp_path, monkeypatch) == by_dvc


def test_tables_in_mlflow_name_classes_in_words(chain):
    tables = chain.parents[3].rglob("mlartifacts/**/tables/per_class.json")
    texts = [file.read_text(encoding="utf-8") for file in tables]
    assert sum("digit seven" in text for text in texts) >= 2, "of finetune and evaluate"


def test_the_registered_model_predicts_what_was_measured(chain):
    """By the files in MLflow alone: its top-1 over the validation set is the stage's, to the last digit."""
    from mlflow import MlflowClient

    from vitpipe.data.shards import open_shards
    from vitpipe.track.model_folder import open_predictor

    store = chain.parents[3]
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'vitpipe-itpn-pixel_base-finetune'")
    assert client.get_registered_model(version.name).aliases["candidate"] == 1
    assert version.run_id == open_artifact(chain / "finetune").run.tracking_run
    # The report has replaced the card of the stage by one with the verdict.
    assert "| top-1 accuracy, ImageNet-1K |" in version.description
    assert "not comparable, " in version.description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    place = Path(model.artifact_location.removeprefix("file:"))
    images = open_shards(chain / "prepare", "imagenet", "val")
    predict = open_predictor(place / "artifacts" / "model")
    samples = images.read_many(range(len(images)))
    rows = predict([sample.image_bytes for sample in samples])
    hits = [row["class"] == images.classes[sample.label] for row, sample in zip(rows, samples, strict=True)]
    assert sum(hits) / len(hits) == metrics_in(chain / "finetune")["top1"]


@pytest.mark.docker
def test_containers_give_what_dvc_gives(by_dvc, real_engine, tmp_path, monkeypatch):
    assert run_package(tmp_path, monkeypatch) == by_dvc
