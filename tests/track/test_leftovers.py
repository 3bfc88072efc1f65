"""What stages that died left behind is found, sent and marked by whoever comes next."""

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
from vitpipe.track.outbox import Origin, Outbox
from vitpipe.track.producer import Producer
from vitpipe.track.server import TrackingError
from vitpipe.track.stage_run import stage_run
from vitpipe.track.sync import keep_unsent, outboxes_below, sync_beside, sync_pending

DEAD = Producer.of_this_process().model_copy(update={"pid": 2**22 + 1})


def _box(folder, store, producer=DEAD, *, last=None, stage="pretrain") -> Outbox:
    """An outbox with one point, as a stage left it that said `last`, or nothing, before it went."""
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
def test_a_run_whose_process_died_with_its_courier_is_sent_and_marked(store, client, tmp_path, name):
    outbox = _box(tmp_path / name, store)
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"
    assert _run(client, outbox).data.metrics == {"loss": 1.0}
    assert sync_pending(tmp_path) == 0  # it is done, and MLflow is not even asked


def test_a_run_that_was_all_sent_but_not_marked_is_marked(store, client, tmp_path):
    outbox = _box(tmp_path / ".pretrain.state" / "track", store)
    Delivery(outbox).sync()
    assert outbox.is_delivered()
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"


def test_the_next_stage_looks_at_all_boxes_beside_its_own(store, client, tmp_path):
    own = _box(tmp_path / ".probe.state" / "track", store, Producer.of_this_process(), stage="probe")
    dead = _box(tmp_path / ".pretrain.state" / "track", store)
    aside = _box(tmp_path / ".a.state.aside-20260101-101010-other-data" / "track", store)
    kept = keep_unsent(_box(tmp_path / "x" / "track", store, last="FINISHED"), tmp_path / ".x.unsent")
    deeper = _box(tmp_path / "deeper" / ".b.state" / "track", store)
    assert sync_beside(own) == 4  # with the one that was kept: `x` is beside it
    assert _run(client, dead).info.status == _run(client, aside).info.status == "KILLED"
    assert not kept.exists()
    assert not own.run_id
    assert not deeper.run_id


@pytest.mark.slow
def test_the_courier_of_the_next_stage_marks_a_dead_one(store, client, recipe, tmp_path):
    dead = _box(tmp_path / ".pretrain.state" / "track", store)
    with stage_run(stage="probe", recipe=recipe, folder=tmp_path / "p", state=tmp_path / ".p.state"):
        pass
    assert _run(client, dead).info.status == "KILLED"


@pytest.mark.slow
def test_a_stage_that_was_killed_together_with_its_courier_is_marked_by_the_next(
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


def test_a_stage_that_lives_is_left_alone_though_its_courier_died(store, client, tmp_path):
    outbox = _box(tmp_path / ".pretrain.state" / "track", store, Producer.of_this_process())
    assert sync_pending(tmp_path) == 0
    assert not outbox.run_id


def test_a_real_process_is_known_to_live_and_to_have_died(store, client, tmp_path):
    code = (
        "import sys; from vitpipe.track.producer import Producer; "
        "print(Producer.of_this_process().model_dump_json(), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        producer = Producer.model_validate_json(process.stdout.readline())
        outbox = _box(tmp_path / ".pretrain.state" / "track", store, producer)
        assert sync_pending(tmp_path) == 0
    finally:
        process.kill()
        process.communicate()
    assert sync_pending(tmp_path) == 1
    assert _run(client, outbox).info.status == "KILLED"


@pytest.mark.parametrize("producer", [DEAD.model_copy(update={"host": "another"}), None])
def test_on_another_host_and_without_a_name_a_box_is_dead_when_it_has_not_changed_for_minutes(
    store, client, tmp_path, producer
):
    outbox = _box(tmp_path / ".pretrain.state" / "track", store, producer)
    assert sync_pending(tmp_path) == 0
    _age(outbox, 100)
    assert sync_pending(tmp_path) == 0
    _age(outbox, 400)
    outbox.producer_lives()
    assert sync_pending(tmp_path) == (0 if producer else 1)
    _age(outbox, 400)
    sync_pending(tmp_path)
    assert _run(client, outbox).info.status == "KILLED"


def test_folders_of_data_are_not_looked_into(tmp_path, monkeypatch):
    recipe = tmp_path / "artifacts" / "itpn" / "pixel_base" / "demo"
    prepare = recipe / "prepare"
    (prepare / "imagenet" / "track").mkdir(parents=True)
    (prepare / "card.json").write_text("{}")
    (prepare / "imagenet" / "track" / "box.json").write_text("{}")  # a set whose class has this name
    (recipe / ".prepare.partial" / "a" / "b").mkdir(parents=True)
    (recipe / "linked").symlink_to(prepare, target_is_directory=True)
    wanted = [
        _box(recipe / ".pretrain.state" / "track", "http://x").folder,
        _box(recipe / ".pretrain.unsent" / "0a", "http://x").folder,
        _box(tmp_path / "artifacts" / "vit" / "demo" / ".probe.state" / "track", "http://x").folder,
    ]
    looked = []
    real = sync._folders
    monkeypatch.setattr(sync, "_folders", lambda place: (looked.append(place), real(place))[1])
    found = [outbox.folder for outbox in outboxes_below(tmp_path / "artifacts")]
    assert sorted(found) == sorted(wanted)
    assert not [place for place in looked if place.is_relative_to(prepare) or "linked" in place.parts]
    assert recipe / ".prepare.partial" / "a" not in looked


@pytest.mark.parametrize("inner", ["", ".pretrain.state", ".pretrain.state/track"])
def test_a_folder_may_be_named_at_any_level(tmp_path, inner):
    outbox = _box(tmp_path / ".pretrain.state" / "track", "http://x")
    assert [b.folder for b in outboxes_below(tmp_path / inner)] == [outbox.folder]


def test_while_a_copy_waits_the_box_itself_is_not_sent_beside_it(store, client, tmp_path):
    outbox = _box(tmp_path / ".pretrain.state" / "track", "http://127.0.0.1:9", last="FINISHED")
    kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
    with Outbox(kept).locked(wait=True):  # another process sends the copy at this moment
        assert sync_pending(tmp_path) == 0
    assert sync_pending(tmp_path) == 2
    (run_id,) = {outbox.run_id}
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [1.0]


def test_one_box_that_cannot_be_sent_does_not_keep_the_others(store, client, tmp_path, monkeypatch, capsys):
    _box(tmp_path / ".a.state" / "track", "http://127.0.0.1:9")
    _box(tmp_path / ".b.state" / "track", "http://127.0.0.1:9")
    good = _box(tmp_path / ".c.state" / "track", store)
    damaged = _box(tmp_path / ".d.state" / "track", store)
    (damaged.folder / "box.json").write_text("{")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    asked = []
    real = sync.Delivery.sync
    monkeypatch.setattr(sync.Delivery, "sync", lambda self: (asked.append(str(self.store)), real(self))[1])
    with pytest.raises(TrackingError, match="connection refused"):
        sync_pending(tmp_path)
    assert _run(client, good).info.status == "KILLED"
    assert asked.count("http://127.0.0.1:9") == 1  # a server that is gone is asked once
    assert "damaged" in capsys.readouterr().err


def test_what_was_switched_off_is_never_sent(store, tmp_path):
    outbox = _box(tmp_path / ".pretrain.state" / "track", "off")
    assert sync_pending(tmp_path) == 0
    assert not outbox.run_id


def test_somebody_elses_box_is_passed_over(store, tmp_path, monkeypatch, capsys):
    _box(tmp_path / ".pretrain.state" / "track", store)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vitpipe.track.outbox.os.open", refused)
    assert sync_pending(tmp_path) == 0
    assert "Permission denied" in capsys.readouterr().err


def test_an_outbox_of_the_code_before_is_sent(store, client, tmp_path):
    kept = _box(tmp_path / ".pretrain.unsent" / "0123", store, None, last="FINISHED")
    values = json.loads((kept.folder / "box.json").read_text())
    del values["sum"]
    (kept.folder / "box.json").write_text(json.dumps(values))
    assert sync_pending(tmp_path) == 1
    assert not kept.folder.parent.exists()
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    assert sync_pending(tmp_path / "nothing") == 0
