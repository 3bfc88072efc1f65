"""The task at a pipeline's end, with real stages and a killed one: report, marks in MLflow, Kubeflow's outputs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from pod_double import Pod

from vitpipe.config.pipeline_parameters import parameter_of
from vitpipe.contracts.artifact import Artifact, Card, open_artifact, write_card, write_metrics, writing
from vitpipe.stages.conclude import failure_of
from vitpipe.stages.pipeline_run import CONCLUSION, STATUS, PipelineRun
from vitpipe.stages.run_records import keep_record, records_of

PAGES = {"report": "HTML", "verdict": "Markdown"}
FAILED = {"state": "FAILED", "error": {"code": 9, "message": "pod finetune was evicted"}}


def concluded(folder: Path, volume: Path, run: str, status: dict) -> Pod:
    pod = Pod(folder, volume, CONCLUSION, {}, run, more={STATUS: status}, pages=PAGES)
    pod.finish()
    return pod


def shown_runs(volume: Path) -> dict[str, Any]:
    """Stage -> its run in MLflow; the parent by the name `parent`."""
    client = mlflow.MlflowClient(f"sqlite:///{volume / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "vitpipe"]
    found = client.search_runs(experiments) if experiments else []
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return {"parent" if run in parents else run.info.run_name.partition(":")[0]: run for run in found}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A volume on which `prepare` and `pretrain` have finished and `finetune` was killed; the run's folder."""
    folder = tmp_path_factory.mktemp("killed")
    volume = folder / "volume"
    volume.mkdir()
    data = Pod(folder / "pod-prepare", volume, "prepare", {}, "8d3f").finish()
    weights = Pod(folder / "pod-pretrain", volume, "pretrain", {"data": data}, "8d3f").finish()
    long = {parameter_of("finetune"): ["finetune.epochs=500"]}
    inputs = {"data": data, "weights": weights}
    pod = Pod(folder / "pod-finetune", volume, "finetune", inputs, "8d3f", more=long)
    process = pod.start()
    deadline = time.monotonic() + 200
    # Killed as soon as MLflow shows its run.
    while "finetune" not in shown_runs(volume):
        assert process.poll() is None, (pod.folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return folder, volume, ["prepare", "pretrain"]


@pytest.mark.slow
def test_a_failed_run_is_reported_and_its_dead_pod_marked(killed):
    folder, volume, finished = killed
    pod = concluded(folder / "pod-conclude", volume, "8d3f", FAILED)
    log = (pod.folder / "log").read_text()
    assert "The run has failed: pod finetune was evicted" in log
    assert f"Finished: {', '.join(finished)}" in log
    assert set(open_artifact(pod.out, "report").card.parents) == set(finished)
    # The weights of a stage are not copied to the volume, everything that a report shows is.
    records = records_of(volume / "states", PipelineRun("minio://mlpipeline/itpn/8d3f"))
    assert set(records) >= set(finished)
    assert not (records["pretrain"] / "weights.safetensors").exists()
    assert (records["pretrain"] / "tables" / "history.csv").is_file()
    page = (pod.folder / "report").read_text("utf-8")
    assert page.startswith("<!")
    assert "stage finetune did not run" in (pod.folder / "verdict").read_text("utf-8")
    output = json.loads((pod.folder / "executor_output.json").read_text())
    assert set(output["artifacts"]) == {"out", "metrics", *PAGES}

    runs = shown_runs(volume)
    assert runs["finetune"].info.status == "KILLED"
    assert runs["pretrain"].info.status == runs["report"].info.status == "FINISHED"
    # One parent for the whole run, the report of its failure included.
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs.values()}) == 2


@pytest.mark.slow
def test_a_run_that_has_succeeded_is_not_reported_twice(killed):
    folder, volume, _ = killed
    pod = concluded(folder / "pod-succeeded", volume, "8d3f", {"state": "SUCCEEDED"})
    assert not pod.out.exists()
    assert "output of the task 'report'" in (pod.folder / "verdict").read_text("utf-8")
    assert (pod.folder / "report").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_a_run_of_which_nothing_has_finished(killed):
    folder, volume, _ = killed
    pod = concluded(folder / "pod-empty", volume, "another", FAILED)
    assert not pod.out.exists()
    assert "No stage has left results" in (pod.folder / "verdict").read_text("utf-8")


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ({"state": "SUCCEEDED"}, ""),
        (FAILED, "pod finetune was evicted"),
        ({"state": "FAILED"}, "its state is FAILED"),
        ({"state": "CANCELLED", "error": {"message": " "}}, "its state is CANCELLED"),
        # Kubeflow did not say: that is no success.
        (None, "its state is unknown"),
        ("SUCCEEDED", "its state is unknown"),
    ],
)
def test_the_state_of_a_run(status, why):
    assert failure_of(status) == why


def finished(out: Path) -> Path:
    """The output of a stage that has weights and one number."""
    with writing(out) as partial:
        (partial / "weights.safetensors").write_bytes(b"0" * 100)
        write_metrics(partial, {"top1": 0.5})
        write_card(
            partial,
            Card(
                stage="finetune", recipe="r", profile="demo", recipe_digest="r", data_digest="d",
                code_digest="c", image="train", identity="i", parents={}, seed=0, libraries={},
            ),
        )  # fmt: skip
    return out


@pytest.mark.slow
def test_a_volume_that_refuses_records_costs_no_finished_stage(tmp_path):
    states = tmp_path / "volume" / "states"
    states.mkdir(parents=True)
    (states / "runs").write_text("somebody's file")
    pod = Pod(tmp_path / "pod-1", tmp_path / "volume", "prepare", {}, "8d3f")
    pod.finish()
    assert open_artifact(pod.out, "prepare").card.stage == "prepare"
    assert "report of a failed run would lack this stage" in (pod.folder / "log").read_text()
    assert (states / "runs").read_text() == "somebody's file"


def test_a_foreign_card_leads_to_no_other_folder(tmp_path):
    out = finished(tmp_path / "out")
    card = open_artifact(out).card
    (tmp_path / "secret").write_text("not of this stage")
    forged = card.model_copy(update={"files": {**card.files, "../secret": "", str(tmp_path / "secret"): ""}})
    keep_record(tmp_path / "states", PipelineRun("s3://bucket/p/one"), Artifact(out, forged, {}))
    copied = [path for path in (tmp_path / "states").rglob("*") if path.is_file()]
    assert copied
    assert not [path for path in copied if path.name == "secret"]


def test_a_record_is_kept_once_and_of_one_run_only(tmp_path):
    out = finished(tmp_path / "out")
    states, run = tmp_path / "states", PipelineRun("s3://bucket/pipeline/one")
    for _ in range(2):
        keep_record(states, run, open_artifact(out))
    record = records_of(states, run)["finetune"]
    assert open_artifact(record).metrics == {"top1": 0.5}
    assert not (record / "weights.safetensors").exists()
    assert len(list(record.parent.iterdir())) == 1
    assert records_of(states, PipelineRun("s3://bucket/pipeline/two")) == {}
    # Without the address of its run a task leaves nothing, and finds nothing.
    assert records_of(states, PipelineRun("")) == {}
    # A local run needs no copies: its outputs lie together.
    assert records_of(None, PipelineRun(str(tmp_path))) == {"finetune": out}
