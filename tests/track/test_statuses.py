"""A status is set by what is true now: not by a uploader that knows only what was true when it started."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal
from vitpipe.track.outbox import Outbox
from vitpipe.track.producer import Producer


def _dead_producer() -> Producer:
    code = "from vitpipe.track.producer import Producer; print(Producer.of_this_process().model_dump_json())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return Producer.model_validate_json(said)


def _append(outbox: Outbox, **record):
    with outbox.journal.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def _running(outbox: Outbox, time_ms: int) -> Delivery:
    """An outbox whose stage said at a given time that it runs, and a delivery that has sent this."""
    _append(outbox, status="RUNNING", time=time_ms)
    delivery = Delivery(outbox)
    delivery.sync()
    return delivery


def _status(client, run_id):
    return client.get_run(run_id).info.status


def test_an_old_courier_leaves_a_run_alone_that_a_newer_process_has_taken_up(store, client, new_outbox):
    outbox = new_outbox(store)
    old, dead = _running(outbox, 1000), _dead_producer()
    outbox.write_producer(Producer.of_this_process())  # the newer process: this one, which is alive
    _append(outbox, status="RUNNING", time=2000)
    old.mark_killed(ended=dead)
    assert _status(client, old.sent.run_id) == _status(client, old.sent.parent_id) == "RUNNING"


def test_an_old_courier_leaves_a_run_alone_that_a_newer_process_has_finished(store, client, new_outbox):
    outbox = new_outbox(store)
    old = _running(outbox, 1000)
    _append(outbox, status="FINISHED", time=2000)
    Delivery(Outbox(outbox.folder)).sync()
    old.mark_killed()
    assert _status(client, old.sent.run_id) == "FINISHED"


def test_what_mlflow_says_counts_when_the_journal_knows_less(store, client, new_outbox):
    """The state folder was put back from a backup: its journal ends before the run did."""
    outbox = new_outbox(store)
    old = _running(outbox, 1000)
    client.set_terminated(old.sent.run_id, "FINISHED", 5000)
    client.set_terminated(old.sent.parent_id, "FAILED", 5000)
    old.mark_killed()
    assert _status(client, old.sent.run_id) == "FINISHED"
    assert _status(client, old.sent.parent_id) == "FAILED"


def test_the_time_of_death_is_the_last_sign_of_life(store, client, new_outbox):
    outbox = new_outbox(store)
    _append(outbox, status="RUNNING", time=1000)
    _append(outbox, time=61_000, step=1, values={"loss": 1.0})
    _append(outbox, commit=None)
    delivery = Delivery(outbox)
    delivery.sync()
    delivery.mark_killed()
    run = client.get_run(delivery.sent.run_id)
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("KILLED", 1000, 61_000)


def test_a_death_that_was_seen_has_the_time_when_it_was_seen(store, client, new_outbox):
    outbox, now_ms = new_outbox(store), int(time.time() * 1000)
    delivery = _running(outbox, now_ms - 60_000)
    delivery.mark_killed(now_ms=now_ms)
    assert client.get_run(delivery.sent.run_id).info.end_time == now_ms


def test_a_killed_run_that_is_resumed_runs_again(store, client, new_outbox):
    outbox = new_outbox(store)
    first = _running(outbox, 1000)
    _append(outbox, time=50_000, step=1, values={"loss": 1.0})
    first.mark_killed()
    assert _status(client, first.sent.run_id) == "KILLED"
    _running(Outbox(outbox.folder), 51_000)
    assert _status(client, first.sent.run_id) == _status(client, first.sent.parent_id) == "RUNNING"


@pytest.mark.parametrize("late", ["RUNNING", "FAILED"])
def test_a_late_status_of_a_stale_copy_does_not_replace_a_younger_one(store, client, new_outbox, late):
    outbox = new_outbox(store)
    stale = _running(outbox, 1000)
    _append(outbox, status=late, time=2000)  # said, but not sent before the next process finished
    stale._reader.refresh()
    later = Delivery(Outbox(outbox.folder))
    later.sync()
    later._runs.set_status(later.sent.run_id, later.sent.parent_id, "FINISHED", 3000)
    stale.sync()
    assert _status(client, stale.sent.run_id) == _status(client, stale.sent.parent_id) == "FINISHED"


def test_the_pipelines_run_belongs_to_the_stage_that_spoke_last(store, client, new_outbox):
    first, second = new_outbox(store, "pretrain"), new_outbox(store, "finetune")
    pretrain, finetune = _running(first, 1000), _running(second, 2000)
    assert pretrain.sent.parent_id == finetune.sent.parent_id
    pretrain.mark_killed()
    assert _status(client, pretrain.sent.run_id) == "KILLED"
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"
    _append(first, status="FAILED", time=1500)  # an older word that arrives late
    Delivery(Outbox(first.folder)).sync()
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"
    finetune.mark_killed()
    assert _status(client, finetune.sent.parent_id) == "KILLED"


def test_of_two_stages_with_the_same_clock_the_one_that_mlflow_heard_last_has_the_pipeline(
    store, client, new_outbox
):
    pretrain = _running(new_outbox(store, "pretrain"), 1000)
    _running(new_outbox(store, "finetune"), 1000)
    pretrain.mark_killed()
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"


def test_a_box_of_the_present_code_has_every_field_that_decides(store, new_outbox):
    outbox = new_outbox(store)
    Journal(outbox.journal).status("RUNNING")
    record = json.loads(outbox.journal.read_text())
    assert set(record) == {"time", "status", "sum"}
