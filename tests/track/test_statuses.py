"""An older status never replaces a later one, whichever process sends it."""

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
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return Producer.model_validate_json(output)


def _append(outbox: Outbox, **record):
    with outbox.journal.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def _running(outbox: Outbox, time_ms: int) -> Delivery:
    """Record RUNNING at a given time, and send it."""
    _append(outbox, status="RUNNING", time=time_ms)
    delivery = Delivery(outbox)
    delivery.sync()
    return delivery


def _status(client, run_id):
    return client.get_run(run_id).info.status


def test_an_old_uploader_does_not_change_a_run_that_a_newer_process_continues(store, client, new_outbox):
    outbox = new_outbox(store)
    old, dead = _running(outbox, 1000), _dead_producer()
    outbox.write_producer(Producer.of_this_process())  # the newer process: this one, which is alive
    _append(outbox, status="RUNNING", time=2000)
    old.mark_killed(ended=dead)
    assert _status(client, old.sent.run_id) == _status(client, old.sent.parent_id) == "RUNNING"


def test_an_old_uploader_does_not_change_a_run_that_a_newer_process_has_finished(store, client, new_outbox):
    outbox = new_outbox(store)
    old = _running(outbox, 1000)
    _append(outbox, status="FINISHED", time=2000)
    Delivery(Outbox(outbox.folder)).sync()
    old.mark_killed()
    assert _status(client, old.sent.run_id) == "FINISHED"


def test_a_final_status_in_mlflow_stays_when_the_journal_lacks_it(store, client, new_outbox):
    """The state folder was restored from a backup: its journal ends before the run did."""
    outbox = new_outbox(store)
    old = _running(outbox, 1000)
    client.set_terminated(old.sent.run_id, "FINISHED", 5000)
    client.set_terminated(old.sent.parent_id, "FAILED", 5000)
    old.mark_killed()
    assert _status(client, old.sent.run_id) == "FINISHED"
    assert _status(client, old.sent.parent_id) == "FAILED"


def test_the_end_time_of_a_killed_run_is_the_time_of_its_last_record(store, client, new_outbox):
    outbox = new_outbox(store)
    _append(outbox, status="RUNNING", time=1000)
    _append(outbox, time=61_000, step=1, values={"loss": 1.0})
    _append(outbox, commit=None)
    delivery = Delivery(outbox)
    delivery.sync()
    delivery.mark_killed()
    run = client.get_run(delivery.sent.run_id)
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("KILLED", 1000, 61_000)


def test_the_end_time_of_an_observed_death_is_the_time_of_observation(store, client, new_outbox):
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
def test_a_late_status_of_a_stale_copy_does_not_replace_a_later_one(store, client, new_outbox, late):
    outbox = new_outbox(store)
    stale = _running(outbox, 1000)
    _append(outbox, status=late, time=2000)  # recorded, but not sent before the next process finished
    stale._reader.refresh()
    later = Delivery(Outbox(outbox.folder))
    later.sync()
    later._runs.set_status(later.sent.run_id, later.sent.parent_id, "FINISHED", 3000)
    stale.sync()
    assert _status(client, stale.sent.run_id) == _status(client, stale.sent.parent_id) == "FINISHED"


def test_the_pipelines_run_has_the_status_of_the_stage_that_set_it_last(store, client, new_outbox):
    first, second = new_outbox(store, "pretrain"), new_outbox(store, "finetune")
    pretrain, finetune = _running(first, 1000), _running(second, 2000)
    assert pretrain.sent.parent_id == finetune.sent.parent_id
    pretrain.mark_killed()
    assert _status(client, pretrain.sent.run_id) == "KILLED"
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"
    _append(first, status="FAILED", time=1500)  # an older status that arrives late
    Delivery(Outbox(first.folder)).sync()
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"
    finetune.mark_killed()
    assert _status(client, finetune.sent.parent_id) == "KILLED"


def test_of_two_stages_with_the_same_time_the_one_sent_last_owns_the_pipelines_run(store, client, new_outbox):
    pretrain = _running(new_outbox(store, "pretrain"), 1000)
    _running(new_outbox(store, "finetune"), 1000)
    pretrain.mark_killed()
    assert _status(client, pretrain.sent.parent_id) == "RUNNING"


def test_a_status_record_has_all_fields(store, new_outbox):
    outbox = new_outbox(store)
    Journal(outbox.journal).status("RUNNING")
    record = json.loads(outbox.journal.read_text())
    assert set(record) == {"time", "status", "sum"}
