"""A stage that refuses its input leaves no failed run in MLflow; one that fails at work does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.errors import DatasetError
from vitpipe.track.journal import JournalReader
from vitpipe.track.stage_run import stage_run
from vitpipe.track.uploader import HOLD_SECONDS

pytestmark = pytest.mark.slow


def runs_in(client):
    found = client.get_experiment_by_name("vitpipe")
    return client.search_runs([found.experiment_id]) if found else []


@pytest.fixture
def run_stage(recipe, tmp_path):
    """Run a stage that logs a table, does some work, and then raises."""
    (tmp_path / "out").mkdir()

    def run(error, work=lambda logger: None):
        folders = {"folder": tmp_path / "out", "state": tmp_path / ".out.state"}
        with stage_run(stage="pretrain", recipe=recipe, **folders) as logger:
            logger.table("plan", [{"steps": 3}])
            work(logger)
            raise error

    return run


def train(logger):
    logger.metrics({"train/loss": 1.0}, 1)
    logger.commit(1)


def train_until_mlflow_has_it(logger):
    train(logger)
    assert logger.run_id


REFUSAL = DatasetError("The images are damaged")


def test_nothing_is_left_of_a_refusal(run_stage, client, tmp_path):
    with pytest.raises(DatasetError):
        run_stage(REFUSAL)
    assert not runs_in(client)
    assert not (tmp_path / ".out.state" / "track").exists()


def test_a_stage_that_had_numbers_has_failed(run_stage, client):
    with pytest.raises(DatasetError):
        run_stage(REFUSAL, train_until_mlflow_has_it)
    assert [run.info.status for run in runs_in(client)] == ["FAILED", "FAILED"]


def wait_until_mlflow_has_it(logger):
    assert logger.run_id


def test_a_refusal_after_the_run_has_appeared_deletes_it(run_stage, client, recipe, tmp_path):
    with pytest.raises(DatasetError):
        run_stage(REFUSAL, wait_until_mlflow_has_it)
    assert not runs_in(client)
    assert not (tmp_path / ".out.state" / "track").exists()

    # What ran before it in the chain stays as it was.
    (tmp_path / "prepare").mkdir()
    with stage_run(
        stage="prepare", recipe=recipe, folder=tmp_path / "prepare", state=tmp_path / ".prepare.state"
    ) as logger:
        train(logger)
    with pytest.raises(DatasetError):
        run_stage(REFUSAL, wait_until_mlflow_has_it)
    assert [run.info.status for run in runs_in(client)] == ["FINISHED", "FINISHED"]
    assert {run.data.tags["vitpipe.role"] for run in runs_in(client)} == {"pipeline", "stage"}


def test_what_an_earlier_process_could_not_send_is_kept(run_stage, client, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(KeyboardInterrupt):
            run_stage(KeyboardInterrupt(), train)
    with pytest.raises(DatasetError):
        run_stage(REFUSAL)
    assert not runs_in(client)
    contents = JournalReader(tmp_path / ".out.state" / "track" / "journal.jsonl").refresh()
    assert [(point.name, point.value) for point in contents.final] == [("train/loss", 1.0)]


def test_a_raw_dataset_that_is_refused_leaves_none(client, store, tmp_path):
    (tmp_path / "data" / "imagenet" / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "data" / "imagenet" / "train" / "n01440764" / "a.JPEG").write_bytes(b"no image")
    command = [
        Path(sys.executable).parent / "vitpipe", "run", "prepare", "--recipe", "itpn/pixel_base", "--profile", "full",
        "--set", f"data.root={tmp_path / 'data'}", "--set", "stages=[prepare, pretrain]", "--out", "out/prepare",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert not runs_in(client)
    assert HOLD_SECONDS > 5
