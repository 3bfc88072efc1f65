"""A rejected request, a server error and a server that does not answer are reported differently."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from mlflow_servers import answering_server, authenticating_proxy, silent_server

from vitpipe.track import server as server_module
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal
from vitpipe.track.mlflow_errors import NoAnswerError, TrackingError
from vitpipe.track.outbox import Outbox
from vitpipe.track.server import connect

UNAUTHENTICATED = b"You are not authenticated. Please see the documentation."


@pytest.fixture(params=["database", pytest.param("server", marks=pytest.mark.slow)])
def address(request, store):
    """Address of a database file, and of a real server: their exceptions differ."""
    return (
        store if request.param == "database" else f"http://127.0.0.1:{request.getfixturevalue('server_port')}"
    )


@pytest.fixture
def mlflow(address, monkeypatch):
    """A client of that store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return connect(address)


def _filled(outbox: Outbox) -> Journal:
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"loss": 1.0}, 1)
    journal.points({"loss": 2.0}, 2)
    journal.commit()
    (outbox.files / "a.txt").write_text("a")
    journal.file("a.txt")
    journal.file("a.txt", "pipeline")
    journal.summary({"knn": 0.5}, {"vitpipe.x": "y"}, {})
    return journal


def _history(mlflow, run_id, name="loss"):
    return [(m.step, m.value) for m in mlflow.get_metric_history(run_id, name)]


def _refused(target) -> TrackingError:
    with pytest.raises(TrackingError) as refused:
        Delivery(target).sync() if isinstance(target, Outbox) else connect(target)
    return refused.value


def test_a_deleted_experiment_is_reported_with_the_command_that_restores_it(
    address, mlflow, new_outbox, tmp_path
):
    outbox = new_outbox(address, experiment=tmp_path.name)
    _filled(outbox)
    delivery = Delivery(outbox)
    delivery.sync()
    number = mlflow.get_run(delivery.sent.run_id).info.experiment_id
    mlflow.delete_experiment(number)
    for sender in (outbox, new_outbox(address, "finetune", experiment=tmp_path.name)):
        error = _refused(sender)
        assert error.what == f"MLflow's experiment '{tmp_path.name}' was deleted"
        assert f"`mlflow experiments restore --experiment-id {number}`" in error.fix
        assert "MLFLOW_EXPERIMENT_NAME" in error.fix
        assert "start the server" not in str(error)
    mlflow.restore_experiment(number)
    Delivery(Outbox(outbox.folder)).sync()
    assert outbox.is_delivered()


def test_a_deleted_experiment_that_kubeflow_sets(address, mlflow, new_outbox, tmp_path):
    number = mlflow.create_experiment(f"given {tmp_path.name}")
    mlflow.delete_experiment(number)
    error = _refused(new_outbox(address, experiment_id=number))
    assert f"'given {tmp_path.name}' was deleted" in error.what


@pytest.mark.parametrize("number", ["nope", "987654"])
def test_an_invalid_experiment_id(address, mlflow, new_outbox, number):
    error = _refused(new_outbox(address, experiment_id=number))
    assert error.what.startswith(f"MLflow at {address} rejected a request (")
    assert number in error.what
    assert "MLFLOW_EXPERIMENT_ID" in error.fix
    assert not isinstance(error, NoAnswerError)


def test_a_new_run_replaces_a_deleted_one_and_receives_everything(
    address, mlflow, new_outbox, tmp_path, capsys
):
    outbox = new_outbox(address, pipeline=f"p {tmp_path.name}")
    journal = _filled(outbox)
    first = Delivery(outbox)
    first.sync()
    mlflow.delete_run(first.sent.run_id)
    journal.points({"loss": 3.0}, 3)
    journal.commit()
    journal.status("FINISHED")
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    assert again.sent.run_id != first.sent.run_id
    assert again.sent.parent_id == first.sent.parent_id
    assert _history(mlflow, again.sent.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [f.path for f in mlflow.list_artifacts(again.sent.run_id)] == ["a.txt"]
    assert mlflow.get_run(again.sent.run_id).info.status == "FINISHED"
    assert _history(mlflow, again.sent.parent_id, "knn") == [(0, 0.5)]
    assert f"MLflow run {first.sent.run_id}" in capsys.readouterr().err
    assert outbox.is_delivered()


def test_a_run_that_is_deleted_during_the_delivery(address, mlflow, new_outbox, tmp_path):
    outbox = new_outbox(address, pipeline=f"p {tmp_path.name}")
    journal = _filled(outbox)
    delivery = Delivery(outbox)
    delivery.sync()
    first = delivery.sent.run_id
    for step, status in ((3, None), (4, "FINISHED")):
        mlflow.delete_run(delivery.sent.run_id)
        if status is None:
            journal.points({"loss": 3.0}, step)
            journal.commit()
        else:
            journal.status(status)
        delivery.sync()
    assert delivery.sent.run_id != first
    assert _history(mlflow, delivery.sent.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert mlflow.get_run(delivery.sent.run_id).info.status == "FINISHED"


def test_a_new_run_replaces_a_deleted_run_of_the_pipeline(address, mlflow, new_outbox, tmp_path, capsys):
    outbox = new_outbox(address, pipeline=f"p {tmp_path.name}")
    _filled(outbox)
    first = Delivery(outbox)
    first.sync()
    mlflow.delete_run(first.sent.parent_id)
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    parent_id = again.sent.parent_id
    assert parent_id != first.sent.parent_id
    assert again.sent.run_id == first.sent.run_id
    assert mlflow.get_run(again.sent.run_id).data.tags["mlflow.parentRunId"] == parent_id
    assert _history(mlflow, parent_id, "knn") == [(0, 0.5)]
    assert mlflow.get_run(parent_id).data.params == {"seed": "0"}
    assert [f.path for f in mlflow.list_artifacts(parent_id)] == ["a.txt"]
    assert _history(mlflow, again.sent.run_id) == [(1, 1.0), (2, 2.0)]
    assert first.sent.parent_id in capsys.readouterr().err


@pytest.mark.parametrize("given", ["deleted", "0" * 32, "no such id!"])
def test_a_given_run_that_does_not_exist_is_reported_and_replaced(
    address, mlflow, new_outbox, tmp_path, capsys, given
):
    if given == "deleted":
        given = mlflow.create_run(mlflow.create_experiment(tmp_path.name)).info.run_id
        mlflow.delete_run(given)
    outbox = new_outbox(address, given_run_id=given, pipeline=f"p {tmp_path.name}")
    _filled(outbox).status("FINISHED")
    delivery = Delivery(outbox)
    delivery.sync()
    assert f"run {given} (MLFLOW_RUN_ID)" in capsys.readouterr().err
    run = mlflow.get_run(delivery.sent.run_id)
    assert run.data.metrics == {"loss": 2.0}
    assert (
        mlflow.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "FINISHED"
    )  # created by vitpipe, so vitpipe sets its status


def test_a_given_run_that_is_deleted_later_is_replaced(address, mlflow, new_outbox, tmp_path):
    experiment = mlflow.create_experiment(tmp_path.name)
    kubeflows = mlflow.create_run(experiment).info.run_id
    given = mlflow.create_run(experiment, tags={"mlflow.parentRunId": kubeflows}).info.run_id
    outbox = new_outbox(address, given_run_id=given, experiment_id=experiment)
    journal = _filled(outbox)
    Delivery(outbox).sync()
    mlflow.delete_run(given)
    journal.status("FINISHED")
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    assert again.sent.run_id != given
    assert again.sent.parent_id == kubeflows
    assert _history(mlflow, again.sent.run_id) == [(1, 1.0), (2, 2.0)]
    assert mlflow.get_run(kubeflows).info.status == "RUNNING"  # Kubeflow's plugin sets its status


def test_a_request_that_mlflow_rejects_is_quoted(address, mlflow, new_outbox, monkeypatch):
    outbox = new_outbox(address)
    _filled(outbox)
    monkeypatch.setattr("vitpipe.track.delivery.metric_name", lambda name: f"{name}@")
    error = _refused(outbox)
    assert error.what.startswith(f"MLflow at {address} rejected a request (")
    assert "Names may only contain" in error.what
    assert "start the server" not in error.fix


@pytest.mark.slow
def test_wrong_credentials_at_a_real_server(server_port, monkeypatch, new_outbox):
    with authenticating_proxy(server_port, "me", "right") as port:
        connect(f"http://me:right@127.0.0.1:{port}")
        error = _refused(f"http://me:wrong@127.0.0.1:{port}")
    assert error.what.startswith(f"MLflow at http://me:***@127.0.0.1:{port} rejected a request (")
    assert "MLFLOW_TRACKING_USERNAME" in error.fix


@pytest.mark.parametrize(
    ("status", "body", "what", "fix"),
    [
        (401, UNAUTHENTICATED, "rejected .*not authenticated", "password in MLFLOW_TRACKING_URI"),
        (403, {"error_code": "PERMISSION_DENIED", "message": "Permission denied"}, "rejected .*Permission denied", "password"),
        (403, b"Invalid Host header", "rejected .*Invalid Host header", "--allowed-hosts"),
        (404, b"nothing here", "rejected .*404", "another program answers there"),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "x is wrong"}, "rejected .*x is wrong", "server's log"),
        (500, {"error_code": "INTERNAL_ERROR", "message": "boom"}, "answers with an error .*500", "server's log"),
        (502, b"<html>bad gateway", "answers with an error .*502", "server's log"),
        (503, b"unavailable", "answers with an error .*503", "server's log"),
        (429, b"slow down", "answers with an error .*429", "server's log"),
        (200, b"<html>a log-in page", "answers with an error .*not in a valid JSON", "server's log"),
    ],
)  # fmt: skip
def test_answers_of_a_server(status, body, what, fix, capfd):
    with answering_server(status, body) as (port, _):
        error = _refused(f"http://127.0.0.1:{port}")
    assert not isinstance(error, NoAnswerError)
    import re

    assert re.search(what, error.what), error.what
    assert fix in error.fix
    assert "does not answer" not in str(error)


def test_a_server_that_does_not_answer(monkeypatch):
    refused = _refused("http://127.0.0.1:9")
    unknown = _refused("http://no-such-host.invalid:5000")
    monkeypatch.setattr(server_module, "PROBE_SECONDS", 0.3)
    with silent_server() as (port, _):
        silent = _refused(f"http://127.0.0.1:{port}")
    assert "connection refused" in refused.what
    assert "start the server" in refused.fix
    assert "host name not found" in unknown.what
    assert "correct the host" in unknown.fix
    assert "timeout" in silent.what
    assert all(isinstance(error, NoAnswerError) for error in (refused, unknown, silent))
    assert len({error.fix for error in (refused, unknown, silent)}) == 3


def test_a_server_that_stops_answering_after_the_probe(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(server_module, "probe", lambda address: None)
    with silent_server() as (port, times):
        assert "timeout" in _refused(f"http://127.0.0.1:{port}").what
        assert len(times) == 1  # no retry, which could repeat a request that took effect


@pytest.mark.parametrize(
    ("make", "what", "fix"),
    [
        (lambda p: f"sqlite:///{p}/bad.db", "cannot be opened .*not a database", "repair the database"),
        (lambda p: "postgresql+nodriver://me:x@127.0.0.1:9/db", "cannot be opened", "MLFLOW_TRACKING_URI"),
        (lambda p: "htp://127.0.0.1:9", "rejected .*unsupported URI", "for example http"),
    ],
)
def test_a_database_that_cannot_be_opened(tmp_path, make, what, fix):
    import re

    (tmp_path / "bad.db").write_bytes(b"this is no database, " * 50)
    error = _refused(make(tmp_path))
    assert re.search(what, error.what), error.what
    assert fix in error.fix
    shutil.rmtree(tmp_path / "mlruns", ignore_errors=True)


def test_a_write_that_the_disk_refuses_is_no_error_of_mlflow(store, new_outbox, monkeypatch):
    from vitpipe.contracts.errors import StorageError

    outbox = new_outbox(store)
    _filled(outbox)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitpipe.contracts.files.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        Delivery(outbox).sync()
    monkeypatch.undo()
    with contextlib.suppress(TrackingError):
        Delivery(outbox).sync()
