"""The uploader goes when its stage has gone, and a server that says nothing costs a stage seconds, not minutes."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest
from killed_stage import kill_stage
from mlflow_servers import answering_server, silent_server

from vitpipe.contracts.address import Address
from vitpipe.track import uploader as uploader_module
from vitpipe.track.outbox import Contact, Outbox
from vitpipe.track.producer import Producer
from vitpipe.track.stage_run import stage_run
from vitpipe.track.uploader import Parent, Uploader, carry


@pytest.mark.slow
def test_a_courier_goes_when_its_stage_was_killed_though_a_worker_lives_on(store, client, tmp_path):
    outbox = Outbox(tmp_path / ".out.state" / "track")
    lived_on = kill_stage(tmp_path, lambda: outbox.sent().num_points == 3)
    assert lived_on < 30
    experiment = client.get_experiment_by_name("vitpipe").experiment_id
    runs = client.search_runs([experiment], filter_string="tags.`vitpipe.stage` = 'pretrain'")
    (run,) = runs
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run.info.status == "KILLED"
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "KILLED"
    assert run.info.end_time > run.info.start_time


@pytest.mark.slow
def test_a_courier_goes_though_the_server_accepts_and_never_answers(tmp_path, monkeypatch):
    with silent_server() as (port, times):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        lived_on = kill_stage(tmp_path, lambda: bool(times))
    assert lived_on < 30
    assert not Outbox(tmp_path / ".out.state" / "track").is_delivered()


def test_a_courier_that_is_held_up_is_ended_by_its_own_watch(new_outbox, monkeypatch):
    """A request that never ends, in the main thread, after the stage has died."""
    waited, left = [], []

    def exit_now(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(uploader_module.time, "sleep", waited.append)
    monkeypatch.setattr(uploader_module.os, "_exit", exit_now)
    alive = iter([True, True, False])
    monkeypatch.setattr(Parent, "is_dead", property(lambda self: not next(alive, False)))
    with pytest.raises(SystemExit):
        Parent(Producer.of_this_process(), sys.stdin).watch(new_outbox("http://127.0.0.1:9"))
    assert left == [1]
    assert sum(waited) < 30


def test_a_courier_whose_stage_is_dead_already_sends_once_and_goes(store, client, new_outbox):
    from vitpipe.track.journal import Journal

    outbox = new_outbox(store)
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"loss": 1.0}, 1)
    journal.commit()
    dead = Producer.of_this_process().model_copy(update={"pid": 2**22 + 1})
    outbox.write_producer(dead)
    reading, writing = os.pipe()  # the other end stays open, as with a worker that lives on
    try:
        with os.fdopen(reading, "rb") as words:
            assert carry(outbox, Parent(dead, words))
    finally:
        os.close(writing)
    assert client.get_run(outbox.run_id).info.status == "KILLED"


def test_pauses_are_kept_though_the_stage_speaks(monkeypatch):
    """Each commit says "look"; a server that does not answer is all the same not asked each time."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as words, os.fdopen(writing, "wb", buffering=0) as voice:
        parent = Parent(Producer.of_this_process().model_copy(update={"pid": os.getppid()}), words)
        voice.write(b"look\n")
        started = time.monotonic()
        parent.wait(0.3)
        assert time.monotonic() - started >= 0.3
        assert not parent.is_over
        voice.write(b"look\nend\n")
        parent.wait(60.0)
        assert parent.is_over


def test_a_death_ends_the_wait_though_the_pipe_stays_open():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as words, os.fdopen(writing, "wb"):
        for pause in (0.0, 60.0):
            parent = Parent(Producer.of_this_process().model_copy(update={"pid": 2**22 + 1}), words)
            parent.wait(pause)
            assert parent.is_over


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def handle(new_outbox, monkeypatch):
    """A stage's handle on a uploader that never ends by itself, with a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(uploader_module, "time", clock)
    killed = []
    process = SimpleNamespace(
        pid=7,
        stdin=None,
        poll=lambda: -9 if killed else None,
        kill=lambda: killed.append(clock.now),
        wait=lambda: 0,
    )
    monkeypatch.setattr(uploader_module.subprocess, "Popen", lambda *_, **__: process)

    def make(address="http://127.0.0.1:9"):
        return Uploader(new_outbox(address), Address(address)), clock

    return make


def test_a_silent_server_costs_the_patience_once_for_all_waits(handle):
    uploader, clock = handle()
    uploader._box.write_contact(Contact(reached=False, is_asking=True, pid=7))
    for _ in range(5):
        uploader.wait_for_run(30.0)
    uploader.finish()
    assert clock.now <= uploader_module.PATIENCE_SECONDS + uploader_module.LAST_TRY_SECONDS + 1.0 <= 10.0


def test_a_server_that_is_known_not_to_answer_gets_one_last_try(handle):
    uploader, clock = handle()
    uploader._box.write_contact(Contact(reached=False, reason="connection refused", pid=7))
    uploader.wait_for_run(30.0)
    assert clock.now == 0.0
    uploader._patience = 0.0
    uploader.finish()
    assert clock.now == pytest.approx(uploader_module.LAST_TRY_SECONDS, abs=0.2)


def test_what_an_older_courier_says_is_not_taken_for_the_present_ones(handle):
    uploader, _ = handle()
    uploader._box.write_contact(Contact(reached=True, pid=6))
    assert uploader.contact() is None


def test_a_server_that_answers_gets_time_while_things_are_sent(handle, monkeypatch):
    uploader, clock = handle()
    uploader._box.write_contact(Contact(reached=True, pid=7))
    real, sent = uploader._box.sent, uploader._box.sent()
    monkeypatch.setattr(uploader._box, "sent", lambda: sent.model_copy(update={"num_points": int(clock.now)}))
    uploader.finish()
    assert clock.now == pytest.approx(uploader_module.FINISH_SECONDS, abs=1.0)
    clock.now, uploader._process.poll = 0.0, lambda: None
    monkeypatch.setattr(uploader._box, "sent", real)
    uploader.finish()
    assert clock.now == pytest.approx(uploader_module.STALLED_SECONDS, abs=1.0)


def test_a_database_file_is_waited_for_without_an_answer(handle):
    uploader, clock = handle("sqlite:////tmp/mlflow.db")
    uploader.wait_for_run(30.0)
    assert clock.now == pytest.approx(30.0, abs=1.0)


@pytest.mark.slow
def test_three_steps_with_a_silent_server(recipe, tmp_path, monkeypatch, capsys):
    with silent_server() as (port, times):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        with stage_run(
            stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state"
        ) as run:
            for step in (1, 2, 3):
                run.metrics({"loss": 1.0}, step)
                run.commit(step)
            assert run.run_id == ""
        assert time.monotonic() - started < 60
        assert 1 <= len(times) <= 3
    said = capsys.readouterr().out
    assert "MLflow does not answer" in said
    assert f"vitpipe send {tmp_path / '.p.unsent'}" in said


def test_the_probe_is_a_request_without_credentials_that_follows_nobody(tmp_path, monkeypatch):
    from vitpipe.track.server import probe

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password PLANTED\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering_server(200, b"") as (elsewhere, asked_elsewhere):
        for status in (200, 302, 401, 404, 500):
            headers = {"Location": f"http://127.0.0.1:{elsewhere}/login"} if status == 302 else {}
            with answering_server(status, b"whatever", headers) as (port, requests):
                probe(Address(f"http://me:PLANTED@127.0.0.1:{port}/mlflow/?token=PLANTED"))
            assert requests == [("/mlflow/health", None)]
        assert not asked_elsewhere
