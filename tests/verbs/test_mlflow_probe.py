"""Which MLflow runs would use: `vitpipe doctor` asks it, changes nothing, and shows no password."""

import sqlite3

import pytest
from mlflow_servers import answering_server, authenticating_proxy, real_server, silent_server

from vitpipe.verbs import mlflow_probe
from vitpipe.verbs.mlflow_probe import examine_mlflow


@pytest.fixture
def address(monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    monkeypatch.delenv("VITPIPE_TRACKING", raising=False)
    return lambda text: monkeypatch.setenv("MLFLOW_TRACKING_URI", text)


def test_off(address, monkeypatch, tmp_path):
    address("http://nowhere")
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    assert examine_mlflow(tmp_path) == ("off (VITPIPE_TRACKING): nothing is sent", [])


def test_the_sqlite_file(address, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = tmp_path / "mlflow.db"
    assert examine_mlflow(tmp_path) == (f"sqlite:///{file}: will be made by the first run", [])
    assert not file.exists()
    with sqlite3.connect(file) as database:
        database.execute("create table runs (run_uuid text)")
        database.execute("insert into runs values ('a')")
    before = file.read_bytes()
    assert examine_mlflow(tmp_path) == (f"sqlite:///{file}: may be written, runs: 1", [])
    assert file.read_bytes() == before
    monkeypatch.setattr(mlflow_probe, "_SECONDS", 0.1)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("begin immediate")
    value, (finding,) = examine_mlflow(tmp_path)
    holder.close()
    assert value == f"sqlite:///{file}: may not be written"
    assert "database is locked" in finding.what
    file.write_bytes(b"this is no database, " * 50)
    value, (finding,) = examine_mlflow(tmp_path)
    assert "not a database" in finding.what


def test_nothing_answers(address, monkeypatch, tmp_path):
    address("http://me:secret@127.0.0.1:9")
    value, (finding,) = examine_mlflow(tmp_path)
    assert value == "http://me:***@127.0.0.1:9: does not answer"
    assert "connection refused" in finding.what
    assert "secret" not in f"{value}{finding}"


def test_a_server_that_never_answers(address, monkeypatch, tmp_path):
    monkeypatch.setattr("vitpipe.track.server.PROBE_SECONDS", 0.2)
    with silent_server() as (port, _):
        address(f"http://127.0.0.1:{port}")
        value, (finding,) = examine_mlflow(tmp_path)
    assert value.endswith("does not answer")
    assert "timeout" in finding.what


@pytest.mark.parametrize(
    ("status", "body", "fix"),
    [
        (401, b"You are not authenticated", "correct the user and password"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (200, b"<html>another program</html>", "correct MLFLOW_TRACKING_URI"),
        (404, b"not here", "correct MLFLOW_TRACKING_URI"),
    ],
)
def test_a_server_that_refuses(address, tmp_path, status, body, fix):
    with answering_server(status, body) as (port, _):
        address(f"http://me:secret@127.0.0.1:{port}")
        value, (finding,) = examine_mlflow(tmp_path)
    assert value == f"http://me:***@127.0.0.1:{port}: answers, and refuses to be read"
    assert f"status {status}" in finding.what
    assert fix in finding.fix
    assert "secret" not in f"{value}{finding}"


def test_a_real_server_with_a_password(address, monkeypatch, tmp_path):
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(mlflow_probe, "_SECONDS", 60.0)
    with real_server(tmp_path) as port, authenticating_proxy(port, "me", "secret") as guarded:
        client = MlflowClient(f"http://127.0.0.1:{port}")
        address(f"http://me:secret@127.0.0.1:{guarded}")
        shown = f"http://me:***@127.0.0.1:{guarded}: answers"
        assert examine_mlflow(tmp_path) == (f"{shown}, may be written (experiment 'vitpipe' is new)", [])
        assert client.get_experiment_by_name("vitpipe") is None
        number = client.create_experiment("vitpipe")
        assert examine_mlflow(tmp_path) == (f"{shown}, may be written (experiment 'vitpipe')", [])
        assert client.get_experiment(number).tags == {}
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
        assert examine_mlflow(tmp_path) == (f"{shown}, may be written (experiment 'vitpipe')", [])
        monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
        client.delete_experiment(number)
        value, (finding,) = examine_mlflow(tmp_path)
        assert value == f"{shown}, experiment 'vitpipe' was deleted"
        address(f"http://127.0.0.1:{guarded}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-secret")
        value, (finding,) = examine_mlflow(tmp_path)
        assert "status 401" in finding.what
        assert "wrong-secret" not in f"{value}{finding}"


@pytest.mark.parametrize("name", ['it\'s "mine"', "50%41?mode=ro"])
def test_the_sqlite_file_of_a_folder_with_any_name(address, monkeypatch, tmp_path, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    value, findings = examine_mlflow(folder)
    assert value.endswith("will be made by the first run")
    assert not findings
    (folder / "mlflow.db").write_bytes(b"this is no database, " * 50)
    value, (finding,) = examine_mlflow(folder)
    assert value.endswith("may not be written")
    assert str(folder / "mlflow.db") in finding.fix
    assert "MLFLOW_TRACKING_URI" in finding.fix
