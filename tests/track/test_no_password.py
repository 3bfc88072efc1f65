"""The password of an address reaches the server only: no file, message or run contains it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mlflow_servers import answering_server, authenticating_proxy

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import VitpipeError
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal, UsedDataset
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.outbox import Outbox
from vitpipe.track.server import (
    OFF,
    address_to_use,
    connect,
    experiment_id,
    store_address,
)
from vitpipe.track.stage_run import stage_run
from vitpipe.track.sync import keep_unsent, sync_pending
from vitpipe.track.ui_address import ui_lines

SECRET = "PLANTED"
PLACE = f"https://me:{SECRET}@data.example/set?token={SECRET}"


def _assert_absent(folder, *texts):
    found = [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not found
    assert not [text for text in texts if SECRET in text]


def _run_a_stage(recipe, tmp_path, **more):
    with stage_run(
        stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state",
        tags={"git_remote": PLACE}, params={"data": {"root": PLACE}}, **more,
    ) as run:  # fmt: skip
        run.dataset("set", "1", PLACE, "training", {"place": PLACE, "num_images": 3})
        run.metrics({"loss": 1.0}, 1)
        run.commit(1)
        run.journal.summary({"x": 1.0}, {"from": PLACE}, {"run": PLACE})
        return run.run_id


@pytest.mark.slow
@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@127.0.0.1:9",
        f"http://{SECRET}@127.0.0.1:9/mlflow",
        f"http://me:{SECRET}@no-such-host.invalid",
        f"postgresql://me:{SECRET}@127.0.0.1:9/mlflow",
        f"postgresql+psycopg2://127.0.0.1:9/mlflow?user=me&password={SECRET}",
        f"nonsense://me:{SECRET}@127.0.0.1:9",
    ],
)
def test_a_stage_without_a_reachable_server(recipe, tmp_path, monkeypatch, capfd, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert _run_a_stage(recipe, tmp_path) == ""
    output = capfd.readouterr()
    assert "***" in output.out
    assert (tmp_path / ".p.unsent").is_dir()
    assert (tmp_path / ".p.state" / "track" / "uploader.log").stat().st_size
    with pytest.raises(TrackingError) as refused:
        sync_pending(tmp_path)
    _assert_absent(tmp_path, output.out, output.err, str(refused.value), *capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404, 500, 302])
def test_a_server_that_quotes_the_request(recipe, tmp_path, monkeypatch, capfd, status):
    body = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"I was asked at {PLACE}"}
    headers = {"Location": f"http://me:{SECRET}@127.0.0.1:9/login"} if status == 302 else {}
    with answering_server(status, body, headers) as (port, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{port}")
        assert _run_a_stage(recipe, tmp_path) == ""
    _assert_absent(tmp_path, *capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("has_proxy", [True, False])
def test_a_real_server(server_port, recipe, tmp_path, monkeypatch, capfd, has_proxy):
    if not has_proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{server_port}")
        run_id = _run_a_stage(recipe, tmp_path)
    else:
        with authenticating_proxy(server_port, "me", SECRET) as port:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{port}")
            run_id = _run_a_stage(recipe, tmp_path)
    output = capfd.readouterr()
    _assert_absent(tmp_path, output.out, output.err)
    assert run_id, (tmp_path / ".p.state" / "track" / "uploader.log").read_text()
    run = connect(f"http://127.0.0.1:{server_port}").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.params["data.root"] == "https://me:***@data.example/set?token=***"
    parent = connect(f"http://127.0.0.1:{server_port}").get_run(run.data.tags["mlflow.parentRunId"])
    for found in (run, parent):
        assert SECRET not in json.dumps(found.to_dictionary(), default=str)


@pytest.mark.slow
def test_an_outbox_is_sent_later_with_the_password_of_the_environment(
    server_port, tmp_path, monkeypatch, new_outbox
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with authenticating_proxy(server_port, "me", SECRET) as port:
        address = f"http://me:{SECRET}@127.0.0.1:{port}"
        outbox = new_outbox(address)
        journal = Journal(outbox.journal)
        journal.status("FINISHED")
        outbox.write_sent(outbox.sent().model_copy(update={"run_id": "0" * 32}))  # the run exists
        kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
        for other in ("", "http://elsewhere.invalid", f"http://you:{SECRET}@127.0.0.1:{port}"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
            with pytest.raises(
                TrackingError, match=r"rejected a request.*authenticated.*set MLFLOW_TRACKING_URI.*password"
            ):
                sync_pending(kept)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert sync_pending(kept) == 1
    assert not kept.exists()


def test_credentials_go_to_their_own_server_only():
    shown, whole = Address("http://me:***@host"), Address(f"http://me:{SECRET}@host")
    other = Address(f"http://me:{SECRET}@other")
    assert address_to_use(shown, whole, may_have_run=True) is whole
    assert address_to_use(shown, other, may_have_run=True) is shown
    assert address_to_use(shown, other, may_have_run=False) is other
    assert address_to_use(shown, None, may_have_run=False) is shown
    assert address_to_use(OFF, other, may_have_run=False) == OFF
    assert address_to_use(shown, OFF, may_have_run=True) == OFF


def test_addresses_are_shown_without_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    assert str(store_address(tmp_path)) == "http://me:***@host:5000"
    # Nothing listens there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    assert ui_lines(store_address(tmp_path)) == ["MLflow: http://me:***@127.0.0.1:9/#/experiments"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    assert store_address(tmp_path).secret.endswith(f"{SECRET}@host:5000")
    assert SECRET not in "".join(ui_lines(Address(f"postgresql://me:{SECRET}@db/mlflow")))


def test_an_explicit_address_reaches_the_uploader_by_its_environment_only(monkeypatch):
    from vitpipe.track.uploader import _environment

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert (
        _environment(Address(f"http://me:{SECRET}@host"))["MLFLOW_TRACKING_URI"] == f"http://me:{SECRET}@host"
    )
    assert _environment(Address("http://host"))["MLFLOW_TRACKING_URI"] == "http://host"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "MLFLOW_TRACKING_URI" not in _environment(Address("sqlite:////a/mlflow.db"))


@pytest.mark.slow
def test_the_uploaders_log_hides_what_tracebacks_quote(tmp_path, new_outbox):
    code = (
        "import sys; from vitpipe.track import uploader\n"
        "def fail(*_): print('at', sys.argv[3], end=''); raise ValueError('cannot read ' + sys.argv[3] + chr(10) + sys.argv[3])\n"
        "uploader.upload = fail\nuploader.main()"
    )
    from vitpipe.track.producer import Producer

    outbox = new_outbox("http://127.0.0.1:9")
    producer = Producer.of_this_process().model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", code, str(outbox.folder), producer, PLACE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError" in done.stderr
    assert "https://me:***@data.example" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_an_older_outbox_with_a_password_in_it_is_sent_without_showing_it(
    store, client, new_outbox, tmp_path
):
    outbox = new_outbox(store, params={"data.root": PLACE}, tags={"git_remote": PLACE})
    with Journal(outbox.journal).path.open("a") as handle:
        used = {
            "name": "set",
            "digest": "1",
            "source": PLACE,
            "context": "training",
            "facts": {"place": PLACE},
        }
        handle.write(json.dumps({"dataset": used}) + "\n")
        handle.write(json.dumps({"summary": {"metrics": {}, "tags": {"from": PLACE}}, "time": 1}) + "\n")
    delivery = Delivery(Outbox(outbox.folder))
    delivery.sync()
    for run_id in (delivery.sent.run_id, delivery.sent.parent_id):
        assert SECRET not in json.dumps(client.get_run(run_id).to_dictionary(), default=str)


def test_the_journal_holds_no_password(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.dataset(UsedDataset("set", "1", PLACE, "training", {"place": PLACE, "more": {"place": PLACE}}))
    journal.summary({}, {"from": PLACE}, {})
    _assert_absent(tmp_path, str(journal.contents))


def test_errors_hide_the_password(store, client, monkeypatch):
    address = f"http://me:{SECRET}@127.0.0.1:9"
    with pytest.raises(VitpipeError) as refused:
        connect(address)
    assert SECRET not in str(refused.value)
    client.delete_experiment(experiment_id(client, store, "gone"))
    with pytest.raises(VitpipeError) as deleted:
        experiment_id(client, address, "gone")
    assert SECRET not in str(deleted.value)
