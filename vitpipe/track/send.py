"""Tell MLflow what is in a box: every final point exactly once, whatever was killed in between.

Two places can be interrupted, and both are looked after:

* between making the MLflow run and writing down its number: the run carries the box's random id as a
  tag and is searched for before another one is made;
* between sending points and writing down that they were sent: after a restart, or when a call failed
  with unknown outcome, the run's own history says which of the next points are there already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitpipe.track.box import BOX, Box, Origin
from vitpipe.track.journal import JournalReader, Point, Status, UsedDataset
from vitpipe.track.store import OFF, connect, experiment_id, store_errors

PREFIX = "vitpipe."
UNSENT_SUFFIX = ".unsent"
_BATCH_POINTS, _BATCH_PARAMS, _BATCH_TAGS = 1000, 100, 100  # limits of MLflow's log_batch
_LONGEST_PARAM, _LONGEST_TAG = 6000, 8000
_LONGEST_DATASET_NAME, _LONGEST_DIGEST = 500, 36


class Delivery:
    """Sends one box; call `sync` as often as you like. The caller holds the box's lock."""

    def __init__(self, box: Box) -> None:
        self.box, self.origin, self.sent = box, box.origin(), box.sent()
        # Nothing told yet: an address that was corrected since goes before the one in the box.
        corrected = "" if self.sent.run_id else os.environ.get("MLFLOW_TRACKING_URI", "")
        self.store = corrected or self.origin.store
        self._reader = JournalReader(box.journal)
        self._client: Any = None
        self._unsure = True  # whether points after the cursor may be in MLflow already

    def sync(self) -> None:
        """Send everything that is final.

        Raises:
            StoreError: MLflow does not answer or refuses; what it did not get stays to be sent.
        """
        with store_errors(self.store):
            try:
                self._sync()
            except Exception:
                self._client, self._unsure = None, True
                raise

    def mark_killed(self) -> None:
        """The stage died without a word: say so, unless its last word was another one. Raises as `sync`."""
        statuses = self._reader.refresh().statuses
        if statuses and statuses[-1][0] == "RUNNING" and self.sent.run_id:
            with store_errors(self.store):
                self._set_status("KILLED", statuses[-1][1])

    def _sync(self) -> None:
        ledger = self._reader.refresh()
        if self._client is None:
            self._client = connect(self.store)
            self._open_runs()
        while self.sent.num_points < len(ledger.final):
            start = self.sent.num_points
            self._send_points(ledger.final[start : start + _BATCH_POINTS])
        self._unsure = False
        while self.sent.num_datasets < len(ledger.datasets):
            self._send_dataset(ledger.datasets[self.sent.num_datasets])
            self._note(num_datasets=self.sent.num_datasets + 1)
        while self.sent.num_files < len(ledger.files):
            file = ledger.files[self.sent.num_files]
            run_id = self.sent.run_id if file.target == "run" else self.sent.parent_id
            self._send_file(run_id or self.sent.run_id, file.path)
            self._note(num_files=self.sent.num_files + 1)
        while self.sent.num_summaries < len(ledger.summaries):
            summary = ledger.summaries[self.sent.num_summaries]
            self._send_summary(summary.metrics, summary.tags, summary.time_ms)
            self._note(num_summaries=self.sent.num_summaries + 1)
        if self.sent.num_statuses < len(ledger.statuses):
            self._set_status(*ledger.statuses[-1])
            self._note(num_statuses=len(ledger.statuses))

    def _note(self, **changes: Any) -> None:
        self.sent = self.sent.model_copy(update=changes)
        self.box.write_sent(self.sent)

    # --- runs ---------------------------------------------------------------------------------------

    def _open_runs(self) -> None:
        """Find or make the pipeline's run and the stage's run below it; complete parameters and tags."""
        origin, client = self.origin, self._client
        if not self.sent.run_id:
            if origin.given_run_id:
                run_id = origin.given_run_id
                parent_id = client.get_run(run_id).data.tags.get("mlflow.parentRunId", "")
            else:
                experiment = origin.experiment_id or experiment_id(client, self.store, origin.experiment)
                parent_id = self._pipeline_run(experiment)
                run_id = self._stage_run(experiment, parent_id)
            self._note(run_id=run_id, parent_id=parent_id)
        self._complete(self.sent.run_id, origin.params, _stage_tags(origin))
        if self.sent.parent_id:
            shared = {PREFIX + key: origin.tags[key] for key in ("recipe", "profile") if key in origin.tags}
            self._complete(self.sent.parent_id, origin.pipeline_params, shared)

    def _pipeline_run(self, experiment: str) -> str:
        tags = {f"{PREFIX}role": "pipeline", f"{PREFIX}pipeline": self.origin.pipeline}
        found = self._search(experiment, tags)
        if found:
            return found[0]
        made = self._create(experiment, tags, self.origin.pipeline_title)
        first = (self._search(experiment, tags) or [made])[0]
        if first != made:  # another stage was faster by a moment: keep one
            self._client.delete_run(made)
        return first

    def _stage_run(self, experiment: str, parent_id: str) -> str:
        found = self._search(experiment, {f"{PREFIX}box": self.origin.id})
        if found:
            return found[0]
        tags = {f"{PREFIX}box": self.origin.id, "mlflow.parentRunId": parent_id}
        return self._create(experiment, tags, self.origin.stage)

    def _create(self, experiment: str, tags: Mapping[str, str], title: str) -> str:
        """Make a run that started when the stage did, not when MLflow hears of it."""
        statuses = self._reader.ledger.statuses
        run = self._client.create_run(
            experiment,
            start_time=statuses[0][1] if statuses else None,
            tags={**tags, "mlflow.source.name": "vitpipe", "mlflow.source.type": "LOCAL"},
            run_name=title,
        )
        return run.info.run_id

    def _search(self, experiment: str, tags: Mapping[str, str]) -> list[str]:
        """Run numbers with these tags, oldest first; equal times are put in the same order by everyone."""
        text = " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items())
        runs = self._client.search_runs([experiment], filter_string=text, max_results=50)
        return [run.info.run_id for run in sorted(runs, key=lambda r: (r.info.start_time, r.info.run_id))]

    def _complete(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log what the run lacks. A parameter that is there stays: MLflow refuses to change one."""
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(run_id).data
        new_params = [
            Param(_key(key), value[:_LONGEST_PARAM])
            for key, value in params.items()
            if _key(key) not in data.params
        ]
        new_tags = [
            RunTag(key, value[:_LONGEST_TAG]) for key, value in tags.items() if data.tags.get(key) != value
        ]
        for start in range(0, max(len(new_params), len(new_tags)), _BATCH_PARAMS):
            stop = start + _BATCH_PARAMS
            self._client.log_batch(run_id, params=new_params[start:stop], tags=new_tags[start:stop])

    # --- what is sent -------------------------------------------------------------------------------

    def _send_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        new = points
        if self._unsure:
            there = self._already_there(points)
            new = [p for p in points if (_key(p.name), p.step) not in there]
        if new:
            metrics = [Metric(_key(p.name), p.value, p.time_ms, p.step) for p in new]
            self._client.log_batch(self.sent.run_id, metrics=metrics)
        self._note(num_points=self.sent.num_points + len(points))

    def _already_there(self, points: list[Point]) -> set[tuple[str, int]]:
        known = self._client.get_run(self.sent.run_id).data.metrics
        names = {_key(point.name) for point in points} & set(known)
        return {
            (name, metric.step)
            for name in names
            for metric in self._client.get_metric_history(self.sent.run_id, name)
        }

    def _send_dataset(self, used: UsedDataset) -> None:
        """MLflow knows a dataset by name and digest; one that the run has already is not added again."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type, source = _source(used.source)
        dataset = Dataset(
            name=used.name[:_LONGEST_DATASET_NAME],
            digest=used.digest[:_LONGEST_DIGEST],
            source_type=source_type,
            source=json.dumps(source),
            profile=json.dumps({**used.facts, "digest": used.digest}),
        )
        context = InputTag(key="mlflow.data.context", value=used.context)
        self._client.log_inputs(self.sent.run_id, datasets=[DatasetInput(dataset=dataset, tags=[context])])

    def _send_file(self, run_id: str, path: str) -> None:
        local = self.box.files / path
        folder = str(Path(path).parent)
        self._client.log_artifact(run_id, str(local), None if folder == "." else folder)
        if local.suffix == ".json" and folder == "tables":
            tags = self._client.get_run(run_id).data.tags
            logged = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
            entry = {"path": path, "type": "table"}  # what mlflow.log_table writes: the UI lists tables by it
            if entry not in logged:
                self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def _send_summary(self, metrics: Mapping[str, float], tags: Mapping[str, str], time_ms: int) -> None:
        from mlflow.entities import Metric, RunTag

        parent_id = self.sent.parent_id or self.sent.run_id
        tags = {**tags, f"{PREFIX}cached": self._cached(parent_id, tags)}
        items = [Metric(_key(name), value, time_ms, 0) for name, value in metrics.items()]
        labels = [RunTag(key, value[:_LONGEST_TAG]) for key, value in tags.items()]
        for start in range(0, max(len(items), len(labels)), _BATCH_TAGS):
            stop = start + _BATCH_TAGS
            self._client.log_batch(parent_id, metrics=items[start:stop], tags=labels[start:stop])

    def _cached(self, parent_id: str, tags: Mapping[str, str]) -> str:
        """Stages whose run belongs to another pipeline run, because nothing had changed since."""
        from mlflow.exceptions import MlflowException

        cached = []
        for key, run_id in tags.items():
            if not key.startswith(f"{PREFIX}run.") or not run_id:
                continue
            try:
                other = self._client.get_run(run_id).data.tags.get("mlflow.parentRunId")
            except MlflowException:
                other = None
            if other != parent_id:
                cached.append(key.removeprefix(f"{PREFIX}run."))
        return ", ".join(cached)

    def _set_status(self, status: Status, time_ms: int) -> None:
        # The run of a Kubeflow pipeline belongs to Kubeflow's plugin, which ends it itself.
        parent_id = "" if self.origin.given_run_id else self.sent.parent_id
        for run_id in filter(None, (self.sent.run_id, parent_id)):
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status, time_ms)


def send_pending(folder: Path) -> int:
    """Send every box below `folder` that still has something to say and that nobody else is sending.

    A box that a finished stage left behind (`*.unsent`) is removed when MLflow has all of it.

    Returns:
        How many boxes were sent.

    Raises:
        StoreError: MLflow does not answer; boxes sent before stay sent.
    """
    num_sent = 0
    for mark in sorted(folder.rglob(BOX)):
        box = Box(mark.parent)
        with box.locked(wait=False) as is_mine:
            if not is_mine or (box.is_delivered() and not _is_left_behind(box)):
                continue
            delivery = Delivery(box)
            if delivery.store == OFF:
                continue
            delivery.sync()
            delivery.mark_killed()
            num_sent += 1
        if _is_left_behind(box):
            shutil.rmtree(box.folder)
            if not any(box.folder.parent.iterdir()):
                box.folder.parent.rmdir()
    return num_sent


def keep_unsent(box: Box, place: Path) -> Path | None:
    """Copy a box that MLflow has not got all of to `place`, because its own folder is about to go.

    Returns:
        The copy, or None when nothing is left to send.
    """
    if box.is_delivered():
        return None
    kept = place / box.origin().id
    aside = place / f".{kept.name}"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(box.folder, aside)
    shutil.rmtree(kept, ignore_errors=True)
    aside.replace(kept)
    return kept


def _is_left_behind(box: Box) -> bool:
    return box.folder.parent.name.endswith(UNSENT_SUFFIX)


def _source(place: str) -> tuple[str, dict[str, str]]:
    """MLflow's kind of a place, and the place as that kind is written; its page links to what it can open."""
    scheme = place.partition("://")[0] if "://" in place else ""
    if scheme in ("http", "https"):
        return "http", {"url": place}
    return (scheme or "local"), {"uri": place}


def _stage_tags(origin: Origin) -> dict[str, str]:
    tags = {PREFIX + key: value for key, value in origin.tags.items()}
    tags |= {f"{PREFIX}pipeline": origin.pipeline, f"{PREFIX}role": "stage", f"{PREFIX}stage": origin.stage}
    if "git_commit" in origin.tags:
        tags["mlflow.source.git.commit"] = origin.tags["git_commit"].partition("+")[0]
    return tags


def _quoted(value: str) -> str:
    return value.replace("'", "")


def _key(name: str) -> str:
    """MLflow takes letters, digits, `_ - . / :` and spaces in names."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]
