"""Damaged files of an outbox are detected, and no damage makes a point arrive twice."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time

import pytest

from vitpipe.contracts.errors import StorageError
from vitpipe.track.checked_json import DamagedError, read_checked, write_checked
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal, JournalReader
from vitpipe.track.outbox import OUTBOX_FILE, SENT, Origin, Outbox, SentState
from vitpipe.track.producer import Producer
from vitpipe.track.sync import keep_unsent, sync_pending


def _empty(data):
    return b""


def _half(data):
    return data[: len(data) // 2]


def _flipped(data):
    return data.replace(b'"num_points": 2', b'"num_points": 3').replace(b'"stage": "p', b'"stage": "q')


def _other_key(data):
    return data.replace(b'"num_points"', b'"num_pointr"').replace(b'"stage"', b'"stagd"')


DAMAGES = [_empty, _half, _flipped, _other_key]


def _filled(outbox: Outbox, values=(1.0, 2.0)) -> Journal:
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    for step, value in enumerate(values, start=1):
        journal.points({"loss": value}, step)
    journal.commit()
    return journal


def _history(client, run_id):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_a_damaged_sent_json_nothing_is_sent_twice(store, client, new_outbox, damage, capsys):
    outbox = new_outbox(store)
    journal = _filled(outbox)
    first = Delivery(outbox)
    first.sync()
    path = outbox.folder / SENT
    path.write_bytes(damage(path.read_bytes()))
    assert outbox.sent() is None
    assert not outbox.is_delivered()
    origin = outbox.open(outbox.origin().model_copy(update={"id": "another", "given_run_id": "another"}))
    assert origin.id == first.origin.id
    journal.points({"loss": 3.0}, 3)
    journal.commit()
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    assert again.sent.run_id == first.sent.run_id
    assert _history(client, first.sent.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "sent.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_a_damaged_box_json_the_run_continues_in_the_same_mlflow_run(
    store, client, new_outbox, damage, capsys
):
    outbox = new_outbox(store)
    _filled(outbox).status("FINISHED")
    first = Delivery(outbox)
    first.sync()
    path = outbox.folder / OUTBOX_FILE
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    outbox.write_sent(first.sent.model_copy(update={"num_points": 0}))
    assert sync_pending(outbox.folder) == 0
    assert "is damaged" in capsys.readouterr().err
    path.write_bytes(whole)
    origin = outbox.origin()
    path.write_bytes(damage(whole))
    again = outbox.open(origin.model_copy(update={"id": "another"}))
    assert again.id == first.origin.id
    Delivery(Outbox(outbox.folder)).sync()
    assert _history(client, first.sent.run_id) == [(1, 1.0), (2, 2.0)]


def test_of_two_statuses_in_a_journal_the_later_one_is_the_later(tmp_path):
    """A run continues on a host whose clock is behind."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"status": "RUNNING", "time": 9000}\n{"status": "FINISHED", "time": 10}\n')
    assert JournalReader(path).refresh().statuses == [("RUNNING", 9000), ("FINISHED", 9001)]


def test_any_flipped_bit_is_detected(tmp_path):
    path, chance = tmp_path / "sent.json", random.Random(0)
    sent = SentState(outbox="b" * 32, run_id="1" * 32, parent_id="2" * 32, num_points=1234, num_files=2)
    write_checked(path, sent)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(DamagedError):
            assert (
                read_checked(path, SentState) == sent
            )  # a flip in white space, or one that renames the key of the checksum


def test_files_of_an_earlier_version_are_read(tmp_path, store, client):
    """box.json, sent.json and a journal without checksums, times of commits, or the newer fields."""
    outbox = Outbox(tmp_path / ".probe.state" / "track")
    outbox.files.mkdir(parents=True)
    origin = {
        "id": "0" * 32, "store": store, "experiment": "vitpipe", "experiment_id": "", "given_run_id": "",
        "pipeline": "p", "pipeline_title": "P", "stage": "probe", "params": {"a": "1"}, "pipeline_params": {}, "tags": {},
    }  # fmt: skip
    (outbox.folder / OUTBOX_FILE).write_text(json.dumps(origin, indent=2) + "\n")
    old = {"run_id": "", "parent_id": "", "num_points": 0, "num_datasets": 0, "num_files": 0, "num_summaries": 0,
           "num_statuses": 0}  # fmt: skip
    (outbox.folder / SENT).write_text(json.dumps(old) + "\n")
    lines = [
        {"status": "RUNNING", "time": 1000},
        {"time": 2000, "step": 1, "values": {"loss": 1.0}},
        {"commit": None},
        {"dataset": {"name": "d", "digest": "1", "source": "/d", "context": "training", "facts": {}}},
        {"summary": {"metrics": {"x": 1.0}, "tags": {}}, "time": 3000},
        {"status": "FINISHED", "time": 4000},
    ]
    outbox.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sync_pending(tmp_path) == 1
    assert outbox.sent().run_id
    assert _history(client, outbox.sent().run_id) == [(1, 1.0)]
    assert JournalReader(outbox.journal).refresh().num_damaged == 0
    assert sync_pending(tmp_path) == 0


@pytest.mark.parametrize(
    "line",
    [b'{"time": 1, "step": 2, "values": {"lo', b'{"step": 2}', b'{"time": 1, "values": {"a": 1.0}}',
     b'{"status": "RUNING", "time": 1}', b'{"time": 1, "step": 2, "values": {"a": "x"}}', b'{"dataset": {"nam": "x"}}',
     b'{"commit": "x", "time": 1}', b"\x00\xff\x00"],
)  # fmt: skip
def test_a_damaged_line_is_skipped_with_a_message_and_no_other_is_lost(
    store, client, new_outbox, line, capsys
):
    outbox = new_outbox(store)
    journal = _filled(outbox)
    with outbox.journal.open("ab") as handle:
        handle.write(line + b"\n")
    journal.points({"loss": 3.0}, 3)
    journal.commit()
    delivery = Delivery(outbox)
    delivery.sync()
    assert _history(client, delivery.sent.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    warnings = capsys.readouterr().err
    assert ("skipped: 1" in warnings) == (line != b'{"step": 2}')  # a record of an unknown kind is ignored


def test_a_line_that_was_sent_and_then_damaged_shifts_no_other(store, client, new_outbox):
    outbox = new_outbox(store)
    journal = _filled(outbox, (1.0, 2.0, 3.0))
    Delivery(outbox).sync()
    data = outbox.journal.read_bytes()
    outbox.journal.write_bytes(data.replace(b'"loss": 2.0', b'"loss": 9.0'))  # the checksum no longer fits
    journal.points({"loss": 4.0}, 4)
    journal.commit()
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    assert _history(client, again.sent.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_one_complete_copy_exists_at_every_moment(new_outbox, tmp_path, monkeypatch):
    outbox, place = new_outbox("http://127.0.0.1:9"), tmp_path / ".pretrain.unsent"
    journal = _filled(outbox)
    first = keep_unsent(outbox, place)
    journal.points({"loss": 3.0}, 3)
    journal.commit()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vitpipe.track.sync.shutil.copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_unsent(outbox, place)
    assert Outbox(first).origin().stage == "pretrain"
    with monkeypatch.context() as patch:
        patch.setattr("vitpipe.track.sync.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_unsent(outbox, place)
    assert len(JournalReader(Outbox(first).journal).refresh().final) == 2
    second = keep_unsent(outbox, place)
    assert [path.name for path in place.iterdir() if not path.name.startswith(".")] == [second.name]
    assert len(JournalReader(Outbox(second).journal).refresh().final) == 3


def test_a_copy_with_other_points_or_that_is_being_sent_is_kept(new_outbox, tmp_path):
    outbox, place = new_outbox("http://127.0.0.1:9"), tmp_path / ".pretrain.unsent"
    _filled(outbox)
    first = keep_unsent(outbox, place)
    with Outbox(first).locked(wait=True):
        second = keep_unsent(outbox, place)
    assert first.is_dir()
    outbox.journal.unlink()  # the state folder was lost, and the stage started again
    _filled(outbox, (7.0,))
    keep_unsent(outbox, place)
    assert first.is_dir()
    assert second.is_dir()


def test_an_outbox_with_a_damaged_box_json_can_be_kept(new_outbox, tmp_path):
    outbox = new_outbox("http://127.0.0.1:9")
    _filled(outbox)
    (outbox.folder / OUTBOX_FILE).write_bytes(b"")
    kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
    assert (kept / "journal.jsonl").is_file()


def test_files_are_written_whole_or_not_at_all(new_outbox, monkeypatch):
    outbox = new_outbox("http://127.0.0.1:9")
    outbox.write_sent(SentState(run_id="a", num_points=1))
    synced = []
    real = __import__("os").fsync
    monkeypatch.setattr(
        "vitpipe.contracts.files.os.fsync", lambda descriptor: (synced.append(1), real(descriptor))
    )
    outbox.write_sent(SentState(run_id="a", num_points=2))
    assert synced

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitpipe.contracts.files.os.fsync", full)
    with pytest.raises(StorageError):
        outbox.write_sent(SentState(run_id="a", num_points=3))
    assert outbox.sent().num_points == 2


def test_which_producers_may_be_alive(monkeypatch):
    me, long_ago = Producer.of_this_process(), time.time() - 10_000
    assert me.may_be_alive(long_ago)
    assert not me.model_copy(update={"started": "1"}).may_be_alive(time.time())  # the PID was reused
    assert not me.model_copy(update={"pid": 2**22 + 1}).may_be_alive(time.time())
    elsewhere = me.model_copy(update={"host": "another"})
    assert elsewhere.may_be_alive(time.time() - 60)
    assert not elsewhere.may_be_alive(long_ago)
    container = me.model_copy(update={"kernel": "another namespace"})
    assert container.may_be_alive(time.time() - 60)


def test_a_zombie_is_not_alive():
    import os

    child = os.fork()
    if child == 0:
        os._exit(0)
    time.sleep(0.2)
    from vitpipe.track.producer import _start_ticks

    assert _start_ticks(child) is None
    os.waitpid(child, 0)


def test_a_stored_origin_has_no_password(tmp_path):
    origin = Origin(
        store="http://me:PLANTED@host", experiment="e", pipeline="p", pipeline_title="P", stage="s", params={},
        pipeline_params={}, tags={},
    )  # fmt: skip
    outbox = Outbox(tmp_path / "track")
    assert outbox.open(origin).store.secret == "http://me:PLANTED@host"
    assert str(outbox.origin().store) == outbox.origin().store.secret == "http://me:***@host"
    shutil.rmtree(outbox.folder)
