"""Tracking of a whole stage: with a real store, after a real kill, without a server, under Kubeflow's plugin."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitpipe.contracts.artifact import Artifact, Card, RunRecord, write_metrics
from vitpipe.contracts.errors import DivergenceError, StoppedError, StorageError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.track.delivery import Delivery
from vitpipe.track.outbox import Outbox
from vitpipe.track.run_values import flatten
from vitpipe.track.stage_run import SilentLogger, stage_run
from vitpipe.track.summary import log_pipeline_summary
from vitpipe.track.sync import sync_pending

pytestmark = pytest.mark.slow

# A minimal training stage: a state file every 5 steps, a commit after it, a line per step.
TRAINING = """
import sys
from pathlib import Path
from vitpipe.config.read import load_recipe
from vitpipe.track.stage_run import stage_run
root, num_steps = Path(sys.argv[1]), 40
folder, state = root / "out", root / ".out.state"
folder.mkdir(exist_ok=True)
with stage_run(stage="pretrain", recipe=load_recipe("itpn/pixel_base", "demo"), folder=folder, state=state) as run:
    saved = state / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    run.rewind(first)
    for step in range(first + 1, num_steps + 1):
        run.metrics({"train/loss": 1 / step}, step)
        if step % 5 == 0:
            saved.write_text(str(step))
            run.commit(step)
        print("step", step, flush=True)
        if step == int(sys.argv[2]):
            sys.stdin.readline()  # wait to be killed
"""


class InProcessUploader:
    """Sends from the test's own process: for tests of what is sent, not of the uploader process."""

    def __init__(self, outbox, address):
        self._delivery = Delivery(outbox)

    def server_status(self):
        return None

    def begin(self):
        pass

    def wake(self):
        self._delivery.sync()

    def wait_for_run(self, seconds):
        self._delivery.sync()

    def finish(self):
        self._delivery.sync()


@pytest.fixture
def uploader_in_process(monkeypatch):
    monkeypatch.setattr("vitpipe.track.stage_run.Uploader", InProcessUploader)


def _runs(client, **tags):
    experiment = client.get_experiment_by_name("vitpipe").experiment_id
    found = client.search_runs([experiment])
    return [r for r in found if all(r.data.tags.get(f"vitpipe.{k}") == v for k, v in tags.items())]


def _artifact(folder, stage, metrics, run_id):
    card = Card(
        stage=stage, recipe="r", profile="demo", recipe_digest="1", data_digest="2", code_digest="3", image="train",
        identity="4", parents={}, seed=0, libraries={},
    )  # fmt: skip
    return Artifact(folder, card, metrics, RunRecord(wall_seconds=2.5, tracking_run=run_id))


def test_a_stage_and_its_pipelines_run(uploader_in_process, store, client, recipe, tmp_path, capsys):
    folder, state = tmp_path / "out", tmp_path / ".out.state"
    folder.mkdir()
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    with stage_run(
        stage="evaluate", recipe=recipe, folder=folder, state=state,
        tags={"git_commit": "abc"}, params={"evaluate": {"batch": 64}},
    ) as run:  # fmt: skip
        run.metrics({"train/loss": 0.5}, 7)
        run.table("per_class", [{"class": "0", "top1": 0.9}])
        run.figure("curve", picture)
        write_metrics(folder, {"top1": 0.9})
        own_id = run.run_id
        log_pipeline_summary(
            run,
            {"evaluate": _artifact(folder, "evaluate", {"top1": 0.9}, own_id),
             "finetune": _artifact(folder, "finetune", {"top1": 0.8}, "0" * 32)},
            verdicts=[{"metric": "top1", "verdict": "below"}], files={"report.md": picture}, note="**below**",
        )  # fmt: skip
    (stage,) = _runs(client, stage="evaluate")
    (parent,) = _runs(client, role="pipeline")
    assert stage.info.run_id == own_id
    assert stage.info.status == parent.info.status == "FINISHED"
    assert stage.data.metrics == {"train/loss": 0.5, "top1": 0.9}
    assert stage.data.params == {"evaluate.batch": "64"}
    assert parent.data.metrics["finetune/top1"] == 0.8
    assert parent.data.metrics["evaluate/wall_seconds"] == 2.5
    assert parent.data.params["model.name"] == "hivit_nano"
    assert parent.data.tags["vitpipe.cached"] == "finetune"
    assert parent.data.tags["mlflow.note.content"] == "**below**"
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {"report.md", "tables"}
    assert {f.path for f in client.list_artifacts(own_id)} == {"figures", "tables"}
    with (folder / "tables" / "history.csv").open() as handle:
        assert [(r["step"], r["name"]) for r in csv.DictReader(handle)] == [("7", "train/loss")]
    assert (folder / "tables" / "per_class.csv").is_file()
    assert not (folder / "tables" / "verdict.csv").exists()
    assert capsys.readouterr().out == ""


def _train_until(root, step, *, wait_for=None):
    """Start the training; kill it with SIGKILL when it has done `step` (and `wait_for` exists)."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(root), str(step)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == f"step {step}\n":
            break
    while wait_for is not None and not wait_for.exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("step", "uploader_is_up"), [(17, True), pytest.param(3, False, marks=pytest.mark.slow)]
)
def test_a_run_killed_with_sigkill_continues_in_the_same_mlflow_run(
    store, client, tmp_path, step, uploader_is_up
):
    outbox = Outbox(tmp_path / ".out.state" / "track")
    _train_until(tmp_path, step, wait_for=outbox.folder / "contact.json" if uploader_is_up else None)
    if uploader_is_up:
        with outbox.locked(wait=True):  # the uploader has finished when it releases the lock
            (run,) = _runs(client, stage="pretrain")
        assert run.info.status == "KILLED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == step // 5 * 5
    subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path), "-1"], check=True, capture_output=True)
    (run,) = _runs(client, stage="pretrain")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1 / s) for s in range(1, 41)]
    assert run.info.status == "FINISHED"
    assert len(_runs(client, role="pipeline")) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (DivergenceError("x"), "FAILED"),
        (StoppedError("x"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_the_final_status_is_sent_and_pending_points_are_not(
    uploader_in_process, store, client, recipe, tmp_path, error, status
):
    def work():
        with stage_run(stage="probe", recipe=recipe, folder=tmp_path, state=tmp_path / ".s.state") as run:
            run.metrics({"a": 1.0}, 1)
            run.commit(1)
            run.metrics({"a": 2.0}, 2)
            raise error

    with pytest.raises(type(error)):
        work()
    (found,) = _runs(client, stage="probe")
    assert found.info.status == status
    assert found.data.metrics == {"a": 1.0}
    assert not (tmp_path / "tables").exists()


def test_without_a_server_the_run_continues_and_everything_is_sent_later(
    store, client, recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder, state = tmp_path / "out", tmp_path / ".out.state"
    with stage_run(stage="probe", recipe=recipe, folder=folder, state=state) as run:
        run.metrics({"a": 1.0}, 1)
        assert run.run_id == ""
        run.commit(1)
        run.commit(1)
    kept = tmp_path / ".out.unsent"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "MLflow does not answer" in lines[0]
    assert str(state / "track") in lines[0]
    assert f"vitpipe sync {kept}" in lines[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert sync_pending(tmp_path) >= 1
    assert not kept.exists()
    (found,) = _runs(client, stage="probe")
    assert found.data.metrics == {"a": 1.0}
    assert found.info.status == "FINISHED"


def test_the_next_stage_sends_the_outbox_of_an_earlier_one(store, client, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state"):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with stage_run(stage="evaluate", recipe=recipe, folder=tmp_path / "e", state=tmp_path / ".e.state"):
        pass
    assert not (tmp_path / ".p.unsent").exists()
    assert len(_runs(client, stage="probe")) == 1


def test_a_killed_uploader_loses_no_point(store, client, recipe, tmp_path, capsys):
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state") as run:
        run._uploader._process.kill()
        run._uploader._process.wait()
        run.metrics({"a": 1.0}, 1)
        run.commit(1)
        assert run.run_id == ""
    assert "they are kept in" in capsys.readouterr().out
    assert sync_pending(tmp_path / ".p.unsent") == 1
    (found,) = _runs(client, stage="probe")
    assert found.data.metrics == {"a": 1.0}


def test_kubeflows_run_is_continued_and_its_variable_removed(
    uploader_in_process, store, client, recipe, tmp_path, monkeypatch
):
    experiment = client.create_experiment("kubeflow")
    parent = client.create_run(experiment, run_name="pipeline").info.run_id
    nested = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", nested)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path, state=tmp_path / ".s.state") as run:
        assert "MLFLOW_RUN_ID" not in os.environ
        assert run.run_id == nested
        run.metrics({"a": 1.0}, 1)
        log_pipeline_summary(run, {"probe": _artifact(tmp_path, "probe", {"knn_top1": 0.5}, nested)})
    assert client.get_run(nested).data.metrics == {"a": 1.0}
    assert client.get_run(parent).data.metrics["probe/knn_top1"] == 0.5
    assert client.get_run(parent).info.status == "RUNNING"  # the plugin sets its status
    assert len(client.search_runs([experiment])) == 2


def test_a_dataset_is_sent_once(uploader_in_process, store, client, recipe, tmp_path):
    import numpy as np

    with stage_run(
        stage="finetune",
        recipe=recipe,
        folder=tmp_path,
        state=tmp_path / ".s.state",
        tags={"data_digest": "9" * 64},
    ) as run:
        for _ in range(2):
            run.dataset(
                "imagenet train", "5" * 64, "/prepared/imagenet", "training", {"num_images": np.int64(7)}
            )
    (found,) = _runs(client, stage="finetune")
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.source_type) == ("imagenet train", "local")
    assert json.loads(used.dataset.profile) == {"num_images": 7, "digest": "5" * 64}
    parent = found.data.tags["mlflow.parentRunId"]
    having = [run for run in _runs(client) if run.inputs.dataset_inputs]
    assert {run.info.run_id for run in having} == {found.info.run_id, parent}
    assert [len(run.inputs.dataset_inputs) for run in having] == [1, 1]


def test_without_tracking_no_uploader_is_started_and_the_history_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path, state=tmp_path / ".s.state") as run:
        run.metrics({"a": 1.0}, 1)
        assert run.run_id == ""
    assert (tmp_path / "tables" / "history.csv").is_file()
    assert not list(tmp_path.glob("*.unsent"))
    assert not (tmp_path / ".s.state" / "track" / "uploader.log").exists()


def test_a_full_disk_is_the_reported_error(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_TRACKING", "off")

    def full(*_):
        raise OSError(28, "No space left on device")

    def work():
        with stage_run(stage="probe", recipe=recipe, folder=tmp_path, state=tmp_path / ".s.state") as run:
            monkeypatch.setattr("vitpipe.track.journal.os.write", full)
            run.metrics({"a": 1.0}, 1)

    with pytest.raises(StorageError, match="No space left"):
        work()


def test_the_training_process_never_imports_mlflow():
    code = "import sys, vitpipe.track.stage_run, vitpipe.track.summary; print('mlflow' in sys.modules, 'torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
    )


def test_other_loggers_ignore_a_summary():
    for logger in (SilentLogger(), MemoryLogger()):
        log_pipeline_summary(logger, {})
    discarding = SilentLogger()
    discarding.metrics({"a": 1.0}, 1)
    discarding.table("t", [{"a": 1}])
    discarding.progress(1, 2, {})
    discarding.dataset("d", "1", "/data", "training", {})
    memory = MemoryLogger()
    memory.dataset("d", "1", "/data", "training", {"a": 1})
    assert memory.datasets == [
        {"name": "d", "digest": "1", "source": "/data", "context": "training", "facts": {"a": 1}}
    ]


def test_parameters_are_flat_and_without_empty_values():
    nested = {"a": {"b": 1, "c": None}, "d": [1, 2], "e": "", "f": {}}
    assert flatten(nested) == {"a.b": "1", "d": "[1, 2]"}


def test_numbers_of_other_libraries_become_plain_in_a_table(recipe, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path, state=tmp_path / ".s.state") as run:
        run.table("t", [{"a": np.float32(0.5), "b": Path("x"), "c": None}])
    stored = json.loads((tmp_path / ".s.state/track/files/tables/t.json").read_text())
    assert stored == {"columns": ["a", "b", "c"], "data": [[0.5, "x", None]]}
