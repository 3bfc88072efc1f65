"""The password of an address reaches the server, and nothing else: no file, no message, no run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mlflow_servers import answering_server, password_in_front_of

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import VitpipeError
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal, UsedDataset
from vitpipe.track.outbox import Outbox
from vitpipe.track.server import (
    OFF,
    TrackingError,
    address_to_use,
    connect,
    experiment_id,
    store_address,
    ui_command,
)
from vitpipe.track.stage_run import stage_run
from vitpipe.track.sync import keep_unsent, sync_pending

SECRET = "PLANTED"
PLACE = f"https://me:{SECRET}@data.example/set?token={SECRET}"


def _assert_nowhere(folder, *texts):
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
        run.journal.summary({"x": 1.0}, {"from": PLACE})
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
def test_a_stage_that_cannot_reach_its_store(recipe, tmp_path, monkeypatch, capfd, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert _run_a_stage(recipe, tmp_path) == ""
    said = capfd.readouterr()
    assert "***" in said.out
    assert (tmp_path / ".p.unsent").is_dir()
    assert (tmp_path / ".p.state" / "track" / "uploader.log").stat().st_size
    with pytest.raises(TrackingError) as refused:
        sync_pending(tmp_path)
    _assert_nowhere(tmp_path, said.out, said.err, str(refused.value), *capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404, 500, 302])
def test_a_server_that_quotes_what_it_was_asked(recipe, tmp_path, monkeypatch, capfd, status):
    body = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"I was asked at {PLACE}"}
    headers = {"Location": f"http://me:{SECRET}@127.0.0.1:9/login"} if status == 302 else {}
    with answering_server(status, body, headers) as (port, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{port}")
        assert _run_a_stage(recipe, tmp_path) == ""
    _assert_nowhere(tmp_path, *capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("has_lock", [True, False])
def test_a_real_server(server_port, recipe, tmp_path, monkeypatch, capfd, has_lock):
    if not has_lock:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{server_port}")
        run_id = _run_a_stage(recipe, tmp_path)
    else:
        with password_in_front_of(server_port, "me", SECRET) as port:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{port}")
            run_id = _run_a_stage(recipe, tmp_path)
    said = capfd.readouterr()
    _assert_nowhere(tmp_path, said.out, said.err)
    assert run_id, (tmp_path / ".p.state" / "track" / "uploader.log").read_text()
    run = connect(f"http://127.0.0.1:{server_port}").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.params["data.root"] == "https://me:***@data.example/set?token=***"
    parent = connect(f"http://127.0.0.1:{server_port}").get_run(run.data.tags["mlflow.parentRunId"])
    for found in (run, parent):
        assert SECRET not in json.dumps(found.to_dictionary(), default=str)


@pytest.mark.slow
def test_a_box_is_sent_later_with_the_password_of_the_environment(
    server_port, tmp_path, monkeypatch, new_outbox
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with password_in_front_of(server_port, "me", SECRET) as port:
        address = f"http://me:{SECRET}@127.0.0.1:{port}"
        outbox = new_outbox(address)
        journal = Journal(outbox.journal)
        journal.status("FINISHED")
        outbox.write_sent(outbox.sent().model_copy(update={"run_id": "0" * 32}))  # told something already
        kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
        for other in ("", "http://elsewhere.invalid", f"http://you:{SECRET}@127.0.0.1:{port}"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
            with pytest.raises(
                TrackingError, match=r"refused.*authenticated.*set MLFLOW_TRACKING_URI.*password"
            ):
                sync_pending(kept)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert sync_pending(kept) == 1
    assert not kept.exists()


def test_whose_credentials_go_where():
    shown, whole = Address("http://me:***@host"), Address(f"http://me:{SECRET}@host")
    other = Address(f"http://me:{SECRET}@other")
    assert address_to_use(shown, whole, is_told=True) is whole
    assert address_to_use(shown, other, is_told=True) is shown
    assert address_to_use(shown, other, is_told=False) is other
    assert address_to_use(shown, None, is_told=False) is shown
    assert address_to_use(OFF, other, is_told=False) == OFF
    assert address_to_use(shown, OFF, is_told=True) == OFF


def test_addresses_are_shown_without_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    assert str(store_address(tmp_path)) == ui_command(store_address(tmp_path)) == "http://me:***@host:5000"
    assert store_address(tmp_path).secret.endswith(f"{SECRET}@host:5000")
    assert SECRET not in ui_command(f"postgresql://me:{SECRET}@db/mlflow")


def test_an_explicit_address_reaches_the_courier_by_its_environment_only(monkeypatch):
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
        "uploader.carry = fail\nuploader.main()"
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


def test_an_older_box_with_a_password_in_it_is_sent_without_showing_it(store, client, new_outbox, tmp_path):
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
    journal.summary({}, {"from": PLACE})
    _assert_nowhere(tmp_path, str(journal.ledger))


def test_errors_of_the_store_hide_it(store, client, monkeypatch):
    address = f"http://me:{SECRET}@127.0.0.1:9"
    with pytest.raises(VitpipeError) as refused:
        connect(address)
    assert SECRET not in str(refused.value)
    client.delete_experiment(experiment_id(client, store, "gone"))
    with pytest.raises(VitpipeError) as deleted:
        experiment_id(client, address, "gone")
    assert SECRET not in str(deleted.value)
