"""Outboxes of killed stages are found, sent and marked KILLED by the next stage or `vitpipe sync`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from killed_stage import kill_stage

from vitpipe.track import sync
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal, JournalReader
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.outbox import Origin, Outbox
from vitpipe.track.producer import Producer
from vitpipe.track.stage_run import stage_run
from vitpipe.track.sync import keep_unsent, outboxes_below, sync_beside, sync_pending

DEAD = Producer.of_this_process().model_copy(update={"pid": 2**22 + 1})


def _outbox(folder, store, producer=DEAD, *, last=None, stage="pretrain") -> Outbox:
    """An outbox with one point, of a stage with the final status `last`, or that was killed without one."""
    outbox = Outbox(folder)
    outbox.open(
        Origin(
            store=store, experiment="vitpipe", pipeline="p", pipeline_title="P", stage=stage, params={},
            pipeline_params={}, tags={},
        )
    )  # fmt: skip
    if producer is not None:
        outbox.write_producer(producer)
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"loss": 1.0}, 1)
    journal.commit()
    if last:
        journal.status(last)
    journal.close()
    return outbox


def _run(client, outbox):
    return client.get_run(outbox.run_id)


def _age(outbox, seconds):
    for path in (*outbox.folder.iterdir(), outbox.folder):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("name", [".pretrain.state/track", ".pretrain.state.aside-20260101-101010-other-data/track",
                                  ".pretrain.state/track.aside-20260101-101010-other-data", "my_state/track"])  # fmt: skip
def test_a_run_whose_process_and_uploader_were_killed_is_sent_and_marked(store, client, tmp_path, name):
    outbox = _outbox(tmp_path / name, store)
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"
    assert _run(client, outbox).data.metrics == {"loss": 1.0}
    assert sync_pending(tmp_path) == 0  # settled: no request to MLflow


def test_a_delivered_run_that_was_not_marked_is_marked(store, client, tmp_path):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", store)
    Delivery(outbox).sync()
    assert outbox.is_delivered()
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"


def test_the_next_stage_sends_all_outboxes_beside_its_own(store, client, tmp_path):
    own = _outbox(tmp_path / ".probe.state" / "track", store, Producer.of_this_process(), stage="probe")
    dead = _outbox(tmp_path / ".pretrain.state" / "track", store)
    aside = _outbox(tmp_path / ".a.state.aside-20260101-101010-other-data" / "track", store)
    kept = keep_unsent(_outbox(tmp_path / "x" / "track", store, last="FINISHED"), tmp_path / ".x.unsent")
    deeper = _outbox(tmp_path / "deeper" / ".b.state" / "track", store)
    assert sync_beside(own) == 4  # `dead`, `aside`, the kept copy of `x`, and `x` itself
    assert _run(client, dead).info.status == _run(client, aside).info.status == "KILLED"
    assert not kept.exists()
    assert not own.run_id
    assert not deeper.run_id


@pytest.mark.slow
def test_the_uploader_of_the_next_stage_marks_a_dead_one(store, client, recipe, tmp_path):
    dead = _outbox(tmp_path / ".pretrain.state" / "track", store)
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state"):
        pass
    assert _run(client, dead).info.status == "KILLED"


@pytest.mark.slow
def test_a_stage_that_was_killed_together_with_its_uploader_is_marked_by_the_next(
    store, client, recipe, tmp_path
):
    outbox = Outbox(tmp_path / ".out.state" / "track")
    kill_stage(tmp_path, lambda: len(JournalReader(outbox.journal).refresh().final) == 3, with_uploader=True)
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state"):
        pass
    run = _run(client, outbox)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 3
    assert run.info.end_time >= run.info.start_time


def test_a_live_stage_without_uploader_is_not_sent(store, client, tmp_path):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", store, Producer.of_this_process())
    assert sync_pending(tmp_path) == 0
    assert not outbox.run_id


def test_a_real_process_is_recognised_as_alive_and_as_dead(store, client, tmp_path):
    code = (
        "import sys; from vitpipe.track.producer import Producer; "
        "print(Producer.of_this_process().model_dump_json(), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        producer = Producer.model_validate_json(process.stdout.readline())
        outbox = _outbox(tmp_path / ".pretrain.state" / "track", store, producer)
        assert sync_pending(tmp_path) == 0
    finally:
        process.kill()
        process.communicate()
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"


@pytest.mark.parametrize("producer", [DEAD.model_copy(update={"host": "another"}), None])
def test_on_another_host_or_without_producer_an_outbox_is_dead_when_unchanged_for_minutes(
    store, client, tmp_path, producer
):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", store, producer)
    assert sync_pending(tmp_path) == 0
    _age(outbox, 100)
    assert sync_pending(tmp_path) == 0
    _age(outbox, 400)
    outbox.touch_producer()
    assert sync_pending(tmp_path) == (0 if producer else 1)
    _age(outbox, 400)
    sync_pending(tmp_path)
    assert _run(client, outbox).info.status == "KILLED"


def test_folders_of_data_are_not_searched(tmp_path, monkeypatch):
    recipe = tmp_path / "artifacts" / "itpn" / "pixel_base" / "demo"
    prepare = recipe / "prepare"
    (prepare / "imagenet" / "track").mkdir(parents=True)
    (prepare / "card.json").write_text("{}")
    (prepare / "imagenet" / "track" / "box.json").write_text("{}")  # a dataset with a class of this name
    (recipe / ".prepare.partial" / "a" / "b").mkdir(parents=True)
    (recipe / "linked").symlink_to(prepare, target_is_directory=True)
    wanted = [
        _outbox(recipe / ".pretrain.state" / "track", "http://x").folder,
        _outbox(recipe / ".pretrain.unsent" / "0a", "http://x").folder,
        _outbox(tmp_path / "artifacts" / "vit" / "demo" / ".probe.state" / "track", "http://x").folder,
    ]
    searched = []
    real = sync._subfolders
    monkeypatch.setattr(sync, "_subfolders", lambda place: (searched.append(place), real(place))[1])
    found = [outbox.folder for outbox in outboxes_below(tmp_path / "artifacts")]
    assert sorted(found) == sorted(wanted)
    assert not [place for place in searched if place.is_relative_to(prepare) or "linked" in place.parts]
    assert recipe / ".prepare.partial" / "a" not in searched


@pytest.mark.parametrize("inner", ["", ".pretrain.state", ".pretrain.state/track"])
def test_a_folder_may_be_given_at_any_level(tmp_path, inner):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", "http://x")
    assert [b.folder for b in outboxes_below(tmp_path / inner)] == [outbox.folder]


def test_an_outbox_is_not_sent_while_a_copy_of_it_is_being_sent(store, client, tmp_path):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", "http://127.0.0.1:9", last="FINISHED")
    kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
    with Outbox(kept).locked(wait=True):  # another process sends the copy at this moment
        assert sync_pending(tmp_path) == 0
    assert sync_pending(tmp_path) == 2
    (run_id,) = {outbox.run_id}
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [1.0]


def test_an_outbox_that_cannot_be_sent_does_not_block_the_others(
    store, client, tmp_path, monkeypatch, capsys
):
    _outbox(tmp_path / ".a.state" / "track", "http://127.0.0.1:9")
    _outbox(tmp_path / ".b.state" / "track", "http://127.0.0.1:9")
    good = _outbox(tmp_path / ".c.state" / "track", store)
    damaged = _outbox(tmp_path / ".d.state" / "track", store)
    (damaged.folder / "box.json").write_text("{")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    asked = []
    real = sync.Delivery.sync
    monkeypatch.setattr(sync.Delivery, "sync", lambda self: (asked.append(str(self.address)), real(self))[1])
    with pytest.raises(TrackingError, match="connection refused"):
        sync_pending(tmp_path)
    assert _run(client, good).info.status == "KILLED"
    assert asked.count("http://127.0.0.1:9") == 1  # one attempt for both outboxes of an unreachable server
    assert "damaged" in capsys.readouterr().err


def test_an_outbox_without_tracking_is_never_sent(store, tmp_path):
    outbox = _outbox(tmp_path / ".pretrain.state" / "track", "off")
    assert sync_pending(tmp_path) == 0
    assert not outbox.run_id


def test_an_outbox_of_another_user_is_skipped(store, tmp_path, monkeypatch, capsys):
    _outbox(tmp_path / ".pretrain.state" / "track", store)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vitpipe.track.outbox.os.open", refused)
    assert sync_pending(tmp_path) == 0
    assert "Permission denied" in capsys.readouterr().err


def test_an_outbox_of_an_earlier_version_is_sent(store, client, tmp_path):
    kept = _outbox(tmp_path / ".pretrain.unsent" / "0123", store, None, last="FINISHED")
    values = json.loads((kept.folder / "box.json").read_text())
    del values["sum"]
    (kept.folder / "box.json").write_text(json.dumps(values))
    assert sync_pending(tmp_path) == 1
    assert not kept.folder.parent.exists()
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    assert sync_pending(tmp_path / "nothing") == 0
