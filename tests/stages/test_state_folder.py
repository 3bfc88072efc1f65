"""States on a volume that outlives pods: the folder's name, and a task that goes on in another pod."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import mlflow
import pytest
import torch
from pod_double import RECIPE, Pod, written_three_minutes_ago
from safetensors.torch import load_file

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.folder_lock import lock_of
from vitpipe.stages.pipeline_run import PipelineRun
from vitpipe.stages.state_folder import state_in


@pytest.mark.slow
def test_a_task_goes_on_in_another_pod(tmp_path):
    """SIGKILL, a fresh file system, one shared volume: the weights are those of an unbroken run."""
    volume = tmp_path / "volume"
    volume.mkdir()
    prepared = Pod(tmp_path / "pod-0", volume, "prepare", {}, "8d3f").finish()
    unbroken = Pod(tmp_path / "alone", tmp_path / "other", "pretrain", {"data": prepared}, "0000")
    (tmp_path / "other").mkdir()
    # Nobody listens at port 9: the run goes on, and its record says that MLflow has not got it.
    unbroken.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    unbroken.finish()
    (note,) = open_artifact(unbroken.out).run.notes
    assert note.startswith("not in MLflow when it ended: ")
    assert "http://127.0.0.1:9" in note
    assert "has not received all records" in (unbroken.folder / "log").read_text()
    output = json.loads((unbroken.folder / "executor_output.json").read_text(encoding="utf-8"))
    assert output["artifacts"]["out"]["artifacts"][0]["metadata"]["notes"] == note

    first = Pod(tmp_path / "pod-1", volume, "pretrain", {"data": prepared}, "8d3f")
    process = first.start()
    deadline = time.monotonic() + 200
    while not list((volume / "states").glob("itpn.pixel_base.demo.pretrain-*/state-*.pt")):
        assert process.poll() is None, (first.folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not first.out.exists()
    (states,) = (volume / "states").glob("itpn.pixel_base.demo.pretrain-*/")
    written_three_minutes_ago(lock_of(states))

    second = Pod(tmp_path / "pod-2", volume, "pretrain", {"data": prepared}, "8d3f")
    second.finish()
    assert "Resuming after step" in (second.folder / "log").read_text()
    weights, expected = (load_file(open_artifact(pod.out, "pretrain").weights) for pod in (second, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)

    client = mlflow.MlflowClient(f"sqlite:///{volume / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "vitpipe")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    stages = {run.info.run_name.partition(":")[0]: run for run in runs if run is not parent}
    assert set(stages) == {"prepare", "pretrain"}  # one run of two tries, below one parent
    for run in stages.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["vitpipe.kubeflow_run"] == "8d3f"
        assert run.data.tags["vitpipe.kubeflow_page"] == "https://kubeflow.example/#/runs/details/8d3f"
        assert run.data.tags["vitpipe.image"] == "registry.example/train@sha256:0"
    tries = {stage: run.data.tags.get("vitpipe.tries") for stage, run in stages.items()}
    assert tries == {"prepare": None, "pretrain": "2"}


def test_the_folder_is_that_of_what_decides_the_weights():
    stage = all_stages()["pretrain"]

    def folder(*overrides: str) -> Path:
        return state_in(Path("/state"), stage, load_recipe(RECIPE, "demo", overrides), {})

    assert folder().parent == Path("/state")
    assert folder().name.startswith("itpn.pixel_base.demo.pretrain-")
    # Neither what is only shown nor another stage's values give it another name.
    assert folder() == folder("pretrain.log_every_steps=7", "finetune.epochs=2", "data.workers=2")
    assert len({folder(), folder("seed=9"), folder("pretrain.epochs=2")}) == 3


@pytest.mark.parametrize(
    ("folder", "run"), [("s3://store/v2/itpn/8d3f", "8d3f"), ("/root/itpn-2026", "itpn-2026"), ("", "")]
)
def test_only_what_is_known_becomes_a_tag(folder, run, monkeypatch):
    for name in ("VITPIPE_IMAGE", "POD_NAME", "KFP_POD_NAME", "VITPIPE_KUBEFLOW_PAGES"):
        monkeypatch.delenv(name, raising=False)
    assert PipelineRun(folder).tags() == ({"kubeflow_run": run} if run else {})
