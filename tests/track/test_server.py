"""Address of MLflow, and opening it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.address import Address
from vitpipe.track.mlflow_errors import TrackingError, tracking_errors
from vitpipe.track.runs_view import VIEW_TAG, share_view
from vitpipe.track.server import OFF, connect, experiment_id, store_address
from vitpipe.track.ui_address import ui_lines


def test_the_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store_address(tmp_path).secret == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_address(tmp_path).secret == "http://mlflow:5000"
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    assert store_address(tmp_path) == OFF


def test_the_command_that_shows_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "VIRTUAL_ENV", sys.prefix
    )  # activated; tests/contracts/test_shell.py has the other case
    command, page = ui_lines(Address(f"sqlite:///{tmp_path}/mlflow.db"))
    assert command == "MLflow: mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert page.endswith("then http://127.0.0.1:5000/#/experiments")  # there is none yet
    assert not (tmp_path / "mlflow.db").exists()
    assert ui_lines(Address("sqlite:////else/where.db"))[0].endswith("sqlite:////else/where.db")
    assert "off" in ui_lines(OFF)[0]


def test_the_page_is_the_runs_table_of_our_experiment(store, client, monkeypatch):
    number = experiment_id(client, store, "vitpipe")
    assert ui_lines(Address(store))[1].endswith(f"#/experiments/{number}/runs?workflowType=machine_learning")
    share_view(client, number)
    share_view(client, number)
    assert ui_lines(Address(store))[1].endswith("workflowType=machine_learning&viewStateShareKey=vitpipe")
    columns = json.loads(client.get_experiment(number).tags[VIEW_TAG])["selectedColumns"]
    assert {"params.`seed`", "metrics.`finetune/top1`", "metrics.`segment/mIoU`"} <= set(columns)
    other = experiment_id(client, store, "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert f"#/experiments/{other}/runs?" in ui_lines(Address(store))[1]


def test_an_experiment_is_created_once_with_its_artifacts_beside_the_database(store, client):
    first = experiment_id(client, store, "mine")
    assert experiment_id(client, store, "mine") == first
    location = client.get_experiment(first).artifact_location
    assert location == (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def test_a_database_that_cannot_be_opened_is_one_clear_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, " * 50)
    with pytest.raises(TrackingError, match=r"MLflow's database cannot be opened .*not a database"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_programming_error_keeps_its_traceback():
    def fail(error):
        with tracking_errors("x"):
            raise error

    with pytest.raises(AttributeError):
        fail(AttributeError("x"))
    with pytest.raises(TrackingError, match="ConnectionError"):
        fail(ConnectionError())


@pytest.mark.slow
def test_two_stages_may_start_at_once_on_a_new_database(tmp_path):
    code = "import sys; from vitpipe.track.server import connect, experiment_id as e; a = sys.argv[1]; e(connect(a), a, 'x')"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = [(p.communicate()[1], p.returncode) for p in processes]
    assert [code for _, code in outcomes] == [0, 0], outcomes


@pytest.mark.parametrize("below", ["tmp_ab12/artifacts", "standalone/tmpx", "tmp_ab12"])
def test_a_queued_experiment_of_dvc_uses_the_store_of_its_repository(tmp_path, monkeypatch, below):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / ".dvc" / "tmp" / "exps" / below
    assert str(store_address(folder)) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    other = tmp_path / "dvc" / "tmp" / "exps" / below
    assert str(store_address(other)) == f"sqlite:///{other.resolve()}/mlflow.db"
