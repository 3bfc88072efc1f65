"""Every record of an outbox reaches MLflow exactly once, whatever fails on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.track import delivery as delivery_module
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal, UsedDataset
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.outbox import Origin, Outbox
from vitpipe.track.sync import keep_unsent, sync_pending

ORIGIN = Origin(
    store="fake", experiment="e", pipeline="p", pipeline_title="P", stage="pretrain",
    params={"a": "1"}, pipeline_params={"b": "2"}, tags={},
)  # fmt: skip


class FlakyClient:
    """The used part of MlflowClient, in memory; fails at random before or after a call took effect."""

    def __init__(self, seed: int, failure_ratio: float) -> None:
        self.runs, self.random, self.failure_ratio = {}, random.Random(seed), failure_ratio
        self.experiment_tags: dict[str, str] = {}
        self._numbers = itertools.count()

    def _maybe_fail(self):
        if self.random.random() < self.failure_ratio:
            raise ConnectionError("gone")

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(value) or name == "random":
            return value

        def call(*args, **kwargs):
            self._maybe_fail()
            result = value(*args, **kwargs)
            self._maybe_fail()
            return result

        return call

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1", name=name, lifecycle_stage="active")

    def get_experiment(self, experiment):
        return SimpleNamespace(experiment_id=experiment, tags=dict(self.experiment_tags))

    def set_experiment_tag(self, experiment, key, value):
        self.experiment_tags[key] = value

    def search_runs(self, experiments, filter_string, max_results):
        wanted = [part.split(" = ") for part in filter_string.split(" and ")]
        pairs = [(key.removeprefix("tags.").strip("`"), value.strip("'")) for key, value in wanted]
        return [r for r in self.runs.values() if all(r.data.tags.get(k) == v for k, v in pairs)]

    def create_run(self, experiment, start_time, tags, run_name):
        run_id = f"r{next(self._numbers)}"
        self.runs[run_id] = SimpleNamespace(
            info=SimpleNamespace(
                run_id=run_id,
                start_time=start_time,
                status="RUNNING",
                lifecycle_stage="active",
                experiment_id=experiment,
            ),
            data=SimpleNamespace(tags=dict(tags), params={}, metrics={}),
            history=[],
            datasets={},
            num_log_inputs=0,
        )
        return self.runs[run_id]

    def get_run(self, run_id):
        return self.runs[run_id]

    def delete_run(self, run_id):
        del self.runs[run_id]

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        run = self.runs[run_id]
        run.history += [(m.key, m.step, m.value) for m in metrics]
        run.data.metrics |= {m.key: m.value for m in metrics}
        run.data.params |= {p.key: p.value for p in params}
        run.data.tags |= {t.key: t.value for t in tags}

    def log_inputs(self, run_id, datasets):
        for used in datasets:
            key = (used.dataset.name, used.dataset.digest)
            self.runs[run_id].datasets.setdefault(key, used)  # as MLflow's stores do
            self.runs[run_id].num_log_inputs += 1

    def get_metric_history(self, run_id, name):
        return [SimpleNamespace(step=s, timestamp=0) for n, s, _ in self.runs[run_id].history if n == name]

    def update_run(self, run_id, status):
        self.runs[run_id].info.status = status

    def set_terminated(self, run_id, status, end_time):
        self.runs[run_id].info.status = status


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 12))
def test_every_point_arrives_once_whatever_fails(seed, failure_ratio, num_steps):
    """Failures before and after each call, replaced uploaders, and points that arrive meanwhile."""
    chance, client = random.Random(seed), FlakyClient(seed, failure_ratio)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery_module, "connect", lambda address, **_: client)
        patch.setattr(delivery_module, "_BATCH_POINTS", 3)
        patch.delenv("MLFLOW_TRACKING_URI")
        outbox = Outbox(Path(folder) / "outbox")
        outbox.open(ORIGIN)
        journal = Journal(outbox.journal)
        journal.status("RUNNING")
        delivery = Delivery(outbox)
        for step in range(num_steps):
            journal.dataset(UsedDataset(f"set {step % 3}", "d", "/data", "training", {}))
            journal.points({"loss": float(step), "weird@name": float(step)}, step)
            if chance.random() < 0.5:
                journal.commit(step)
            if chance.random() < 0.3:
                delivery = Delivery(outbox)  # the uploader was killed and replaced
            with contextlib.suppress(TrackingError):
                delivery.sync()
        journal.commit()
        journal.status("FINISHED")
        client.failure_ratio = 0.0
        delivery.sync()
        stages = [r for r in client.runs.values() if "vitpipe.box" in r.data.tags]
        assert len(stages) == 1
        assert len(client.runs) == 2
        wanted = [(name, s, float(s)) for s in range(num_steps) for name in ("loss", "weird_name")]
        assert sorted(stages[0].history) == sorted(wanted)
        assert stages[0].info.status == "FINISHED"
        names = [f"set {number}" for number in range(min(num_steps, 3))]
        assert [name for name, _ in stages[0].datasets] == names
        if failure_ratio == 0.0:
            assert stages[0].num_log_inputs == len(names)
        assert stages[0].data.params == {"a": "1"}
        assert outbox.is_delivered()


def test_a_kill_between_sending_and_storing_that_it_was_sent(store, client, new_outbox, monkeypatch):
    outbox = new_outbox(store)
    journal = Journal(outbox.journal)
    journal.points({"loss": 1.0}, 1)
    journal.commit()
    delivery = Delivery(outbox)
    monkeypatch.setattr(outbox, "write_sent", lambda sent: None)  # as after a kill: not stored
    delivery.sync()
    journal.points({"loss": 2.0}, 2)
    journal.commit()
    again = Delivery(Outbox(outbox.folder))
    again.sync()
    history = client.get_metric_history(again.sent.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]
    assert again.sent.run_id == delivery.sent.run_id


def test_a_whole_stage_in_a_real_store(store, client, new_outbox):
    outbox = new_outbox(store)
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"train/loss": 0.5}, 10)
    journal.commit()
    (outbox.files / "tables").mkdir()
    (outbox.files / "tables" / "x.json").write_text(json.dumps({"columns": ["a"], "data": [[1], [2]]}))
    journal.file("tables/x.json")
    journal.file("tables/x.json")
    journal.dataset(UsedDataset("imagenet/train", "d" * 64, "/data", "training", {}))
    journal.status("FINISHED")
    delivery = Delivery(outbox)
    delivery.sync()
    run = client.get_run(delivery.sent.run_id)
    parent = client.get_run(delivery.sent.parent_id)
    assert run.info.status == parent.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.params == {"pretrain.epochs": "3"}
    assert parent.data.params == {"seed": "0"}
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    table = client.load_table(run.info.experiment_id, "tables/x.json", [run.info.run_id])
    assert list(table["a"]) == [1, 2]
    assert len(json.loads(run.data.tags["mlflow.loggedArtifacts"])) == 1
    assert (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts").is_dir()


def test_datasets_show_on_the_runs_page(store, client, new_outbox):
    from mlflow.data import get_source

    outbox = new_outbox(store)
    journal = Journal(outbox.journal)
    digest, facts = "0123456789abcdef" * 4, {"num_images": 12, "dvc_md5": "x.dir"}
    places = ("s3://bucket/sets/imagenet", "https://host/x", "/data/prepared")
    for place in places:
        journal.dataset(UsedDataset(f"imagenet of {place[:5]}", digest, place, "training", facts))
    journal.dataset(UsedDataset("n" * 600, digest, "/data", "validation", {}))
    journal.status("RUNNING")
    delivery = Delivery(outbox)
    delivery.sync()
    for _ in range(2):  # an uploader that could not store its progress sends again
        outbox.write_sent(delivery.sent.model_copy(update={"num_datasets": 0}))
        Delivery(Outbox(outbox.folder)).sync()
    journal.status("FINISHED")
    Delivery(Outbox(outbox.folder)).sync()
    inputs = client.get_run(delivery.sent.run_id).inputs.dataset_inputs
    by_name = {used.dataset.name: used for used in inputs}
    assert len(inputs) == 4  # and not the prepared folder as a whole, because sets are named
    first = by_name["imagenet of s3://"]
    assert first.dataset.digest == digest[:36]
    assert json.loads(first.dataset.profile) == {**facts, "digest": digest}
    assert [(tag.key, tag.value) for tag in first.tags] == [("mlflow.data.context", "training")]
    assert by_name["n" * 500].tags[0].value == "validation"
    found = [get_source(by_name[f"imagenet of {place[:5]}"].dataset) for place in places]
    assert [getattr(source, "uri", None) or source.url for source in found] == list(places)


def test_stages_of_one_pipeline_share_their_parent(store, client, new_outbox):
    parents = set()
    for stage in ("pretrain", "finetune"):
        delivery = Delivery(new_outbox(store, stage))
        delivery.sync()
        parents.add(delivery.sent.parent_id)
    other = Delivery(new_outbox(store, "probe", pipeline="q"))
    other.sync()
    assert len(parents) == 1
    assert other.sent.parent_id not in parents


def test_of_two_pipeline_runs_created_at_once_one_is_kept(new_outbox, monkeypatch):
    client = FlakyClient(0, 0.0)
    monkeypatch.setattr(delivery_module, "connect", lambda address, **_: client)
    make, tags = client.create_run, {"vitpipe.role": "pipeline", "vitpipe.pipeline": "p"}

    def make_second(experiment, start_time, tags_given, run_name):
        run = make(experiment, start_time, tags_given, run_name)
        if run_name == "P":
            make(experiment, -1, tags, "P of another stage, a moment earlier")
        return run

    monkeypatch.setattr(
        client,
        "create_run",
        lambda e, start_time, tags, run_name: make_second(e, start_time or 0, tags, run_name),
    )
    delivery = Delivery(new_outbox("fake"))
    delivery.sync()
    pipelines = [r.info.run_id for r in client.runs.values() if r.data.tags.get("vitpipe.role") == "pipeline"]
    assert pipelines == [delivery.sent.parent_id]


def test_a_killed_stage_is_marked_and_a_finished_one_is_not(store, client, new_outbox):
    for stage, last in (("pretrain", None), ("finetune", "FINISHED")):
        outbox = new_outbox(store, stage)
        journal = Journal(outbox.journal)
        journal.status("RUNNING")
        if last:
            journal.status(last)
        delivery = Delivery(outbox)
        delivery.sync()
        delivery.mark_killed()
        assert client.get_run(delivery.sent.run_id).info.status == (last or "KILLED")


def test_a_kept_copy_is_sent_to_the_corrected_address_and_removed(store, client, new_outbox, tmp_path):
    outbox = new_outbox("http://127.0.0.1:9")  # the discard port, where no server listens
    journal = Journal(outbox.journal)
    journal.points({"loss": 1.0}, 1)
    journal.commit()
    kept = keep_unsent(outbox, tmp_path / ".pretrain.unsent")
    shutil.rmtree(outbox.folder)
    assert kept is not None
    assert sync_pending(tmp_path) == 1
    assert not kept.parent.exists()
    runs = client.search_runs([client.get_experiment_by_name("vitpipe").experiment_id])
    assert sorted(r.data.metrics.get("loss", 0.0) for r in runs) == [0.0, 1.0]
    assert sync_pending(tmp_path) == 0


def test_an_outbox_that_another_process_sends_is_skipped(store, new_outbox, tmp_path):
    outbox = new_outbox(store)
    Journal(outbox.journal).status("RUNNING")
    with outbox.locked(wait=True):
        assert sync_pending(tmp_path) == 0


def test_a_refused_connection_is_one_error(new_outbox, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(TrackingError, match=r"MLflow does not answer \(.*refused.*127.0.0.1:9"):
        Delivery(new_outbox("http://127.0.0.1:9")).sync()


def test_the_reason_of_a_rejection_is_quoted(new_outbox, monkeypatch):
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"Invalid Host header")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    try:
        with pytest.raises(TrackingError, match="Invalid Host header"):
            Delivery(new_outbox(f"http://127.0.0.1:{server.server_port}")).sync()
    finally:
        server.shutdown()
        server.server_close()


def test_the_former_verb_send_does_the_work_of_sync(store, client, new_outbox, tmp_path):
    from typer.testing import CliRunner

    from vitpipe.cli import app

    outbox = new_outbox(store)
    Journal(outbox.journal).status("FINISHED")
    done = CliRunner().invoke(app, ["send", str(tmp_path)])
    assert done.stdout == "1 run sent\n"
    assert done.stderr == "`vitpipe send` is now `vitpipe sync`; the old name goes with the next version\n"
    assert client.get_run(outbox.run_id).info.status == "FINISHED"
    assert CliRunner().invoke(app, ["sync", str(tmp_path)]).stdout == "0 runs sent\n"
    assert " send " not in CliRunner().invoke(app, ["--help"]).stdout
