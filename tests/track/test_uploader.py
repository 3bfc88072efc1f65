"""The uploader exits after its stage, and a server that never answers delays a stage by seconds, not minutes."""

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
from vitpipe.track.outbox import Outbox, ServerStatus
from vitpipe.track.producer import Producer
from vitpipe.track.stage_run import stage_run
from vitpipe.track.uploader import StageProcess, Uploader, upload


@pytest.mark.slow
def test_the_uploader_exits_after_its_stage_was_killed_though_a_worker_survives(store, client, tmp_path):
    outbox = Outbox(tmp_path / ".out.state" / "track")
    exit_seconds = kill_stage(tmp_path, lambda: outbox.sent().num_points == 3)
    assert exit_seconds < 30
    experiment = client.get_experiment_by_name("vitpipe").experiment_id
    runs = client.search_runs([experiment], filter_string="tags.`vitpipe.stage` = 'pretrain'")
    (run,) = runs
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run.info.status == "KILLED"
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "KILLED"
    assert run.info.end_time > run.info.start_time


@pytest.mark.slow
def test_the_uploader_exits_though_the_server_never_answers(tmp_path, monkeypatch):
    with silent_server() as (port, times):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        exit_seconds = kill_stage(tmp_path, lambda: bool(times))
    assert exit_seconds < 30
    assert not Outbox(tmp_path / ".out.state" / "track").is_delivered()


def test_an_uploader_that_hangs_is_ended_by_its_watching_thread(new_outbox, monkeypatch):
    """A request that never ends, in the main thread, after the stage has died."""
    waited, left = [], []

    def exit_now(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(uploader_module.time, "sleep", waited.append)
    monkeypatch.setattr(uploader_module.os, "_exit", exit_now)
    alive = iter([True, True, False])
    monkeypatch.setattr(StageProcess, "is_dead", property(lambda self: not next(alive, False)))
    with pytest.raises(SystemExit):
        StageProcess(Producer.of_this_process(), sys.stdin).watch(new_outbox("http://127.0.0.1:9"))
    assert left == [1]
    assert sum(waited) < 30


def test_an_uploader_whose_stage_is_already_dead_sends_once_and_exits(store, client, new_outbox):
    from vitpipe.track.journal import Journal

    outbox = new_outbox(store)
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"loss": 1.0}, 1)
    journal.commit()
    dead = Producer.of_this_process().model_copy(update={"pid": 2**22 + 1})
    outbox.write_producer(dead)
    reading, writing = os.pipe()  # the other end stays open, as with a worker that survives
    try:
        with os.fdopen(reading, "rb") as pipe:
            assert upload(outbox, StageProcess(dead, pipe))
    finally:
        os.close(writing)
    assert client.get_run(outbox.run_id).info.status == "KILLED"


def test_messages_of_the_stage_do_not_shorten_a_pause(monkeypatch):
    """Each commit wakes the uploader, but a server that does not answer is not asked at each one."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb", buffering=0) as writer:
        stage = StageProcess(Producer.of_this_process().model_copy(update={"pid": os.getppid()}), pipe)
        writer.write(b"wake\n")
        started = time.monotonic()
        stage.wait(0.3)
        assert time.monotonic() - started >= 0.3
        assert not stage.has_ended
        writer.write(b"wake\nend\n")
        stage.wait(60.0)
        assert stage.has_ended


def test_the_death_of_the_stage_ends_the_wait_though_the_pipe_stays_open():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb"):
        for pause in (0.0, 60.0):
            stage = StageProcess(Producer.of_this_process().model_copy(update={"pid": 2**22 + 1}), pipe)
            stage.wait(pause)
            assert stage.has_ended


class Clock:
    """A clock that only `sleep` advances."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def handle(new_outbox, monkeypatch):
    """Function that creates an `Uploader` whose process never exits by itself, with a clock for tests."""
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


def test_an_unanswering_server_delays_all_waits_together_once(handle):
    uploader, clock = handle()
    uploader._outbox.write_server_status(ServerStatus(reached=False, is_asking=True, pid=7))
    for _ in range(5):
        uploader.wait_for_run(30.0)
    uploader.finish()
    assert clock.now <= uploader_module.NO_ANSWER_SECONDS + uploader_module.LAST_TRY_SECONDS + 1.0 <= 10.0


def test_an_unreachable_server_gets_one_last_attempt(handle):
    uploader, clock = handle()
    uploader._outbox.write_server_status(ServerStatus(reached=False, reason="connection refused", pid=7))
    uploader.wait_for_run(30.0)
    assert clock.now == 0.0
    uploader._no_answer_left = 0.0
    uploader.finish()
    assert clock.now == pytest.approx(uploader_module.LAST_TRY_SECONDS, abs=0.2)


def test_the_status_of_an_older_uploader_is_ignored(handle):
    uploader, _ = handle()
    uploader._outbox.write_server_status(ServerStatus(reached=True, pid=6))
    assert uploader.server_status() is None


def test_a_server_that_answers_gets_time_while_things_are_sent(handle, monkeypatch):
    uploader, clock = handle()
    uploader._outbox.write_server_status(ServerStatus(reached=True, pid=7))
    real, sent = uploader._outbox.sent, uploader._outbox.sent()
    monkeypatch.setattr(
        uploader._outbox, "sent", lambda: sent.model_copy(update={"num_points": int(clock.now)})
    )
    uploader.finish()
    assert clock.now == pytest.approx(uploader_module.FINISH_SECONDS, abs=1.0)
    clock.now, uploader._process.poll = 0.0, lambda: None
    monkeypatch.setattr(uploader._outbox, "sent", real)
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
    output = capsys.readouterr().out
    assert "MLflow does not answer" in output
    assert f"vitpipe sync {tmp_path / '.p.unsent'}" in output


def test_the_probe_is_a_request_without_credentials_or_redirects(tmp_path, monkeypatch):
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
