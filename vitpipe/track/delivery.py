"""Send an outbox to MLflow: every final point exactly once, whichever process is killed at whatever moment.

Three situations need care:

* A kill between creating the MLflow run and storing its ID: the run has the outbox's random ID as a tag and
  is searched by it before another one is created.
* A kill between sending points and storing that they were sent, or a call that failed with unknown outcome:
  the run's metric history shows which of the next points MLflow already has.
* A run that is deleted in MLflow: a new one is created, and everything is sent to it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import hidden
from vitpipe.track.journal import (
    JournalReader,
    OfferedModel,
    PipelineSummary,
    Point,
    UsedDataset,
    without_credentials,
)
from vitpipe.track.mlflow_errors import tracking_errors
from vitpipe.track.mlflow_names import (
    MAX_DATASET_NAME_LENGTH,
    MAX_DIGEST_LENGTH,
    MAX_TAG_LENGTH,
    PREFIX,
    dataset_source,
    metric_name,
    stage_tags,
)
from vitpipe.track.mlflow_runs import Runs, in_batches
from vitpipe.track.model_folder import FILES
from vitpipe.track.model_registry import Registry
from vitpipe.track.outbox import MODEL_FOLDER, Outbox, SentState
from vitpipe.track.producer import Producer
from vitpipe.track.server import address_in_environment, address_to_use, connect, does_not_exist

_BATCH_POINTS = 1000  # MAX_METRICS_PER_BATCH of mlflow/utils/validation.py (3.17); a call costs about 70 ms


def print_to_stderr(line: str) -> None:
    """Print a line to stderr, with the credentials of addresses replaced by `***`."""
    print(hidden(line), file=sys.stderr, flush=True)


class Delivery:
    """Sends one outbox; `sync` can be called repeatedly. The caller holds the outbox's lock.

    Args:
        warn: called with one line for every warning.
        on_answer: called as soon as MLflow answers.

    Raises:
        OSError, DamagedError: from the constructor, when box.json is missing or damaged.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        warn: Callable[[str], None] = print_to_stderr,
        on_answer: Callable[[], None] | None = None,
    ) -> None:
        self.outbox, self.origin = outbox, outbox.origin()
        sent = outbox.sent()
        if sent is None:
            warn(f"{outbox.folder}: sent.json is damaged; checking with MLflow what was sent")
        self.sent = sent if sent is not None else SentState()
        # With a damaged sent.json it is unknown whether the run exists in MLflow, so the stored address is
        # kept.
        may_have_run = sent is None or bool(sent.run_id)
        self.address = address_to_use(self.origin.store, address_in_environment(), may_have_run=may_have_run)
        self._warn, self._on_answer = warn, on_answer
        self._reader = JournalReader(outbox.journal)
        self._client: Any = None
        self._runs: Any = None
        self._must_compare = True  # whether MLflow may have points beyond `sent.num_points`
        # Metric name -> steps in the run's history when the comparison began.
        self._known_steps: dict[str, set[int]] = {}
        self._num_damaged = 0

    def sync(self) -> None:
        """Send everything that is final.

        Raises:
            TrackingError: MLflow does not answer or rejects a request; what it did not get is sent next time.
            StorageError: the disk refuses to store what was sent.
        """
        with tracking_errors(self.address):
            try:
                self._sync_or_reset()
                return
            except Exception as error:
                if not self.sent.run_id or not does_not_exist(error):
                    raise
            # The run was deleted between two calls: the second attempt creates a new one. Outside of the
            # handler, so that the first error is not in the chain of causes of a second one.
            self._sync_or_reset()

    def mark_killed(self, *, ended: Producer | None = None, now_ms: int = 0) -> None:
        """Mark the run KILLED if the stage was killed without a final status. Raises as `sync`.

        A run that another process has continued, or that is not RUNNING in MLflow, is not changed.

        Args:
            ended: a process that is known to have died.
            now_ms: the present (milliseconds since the epoch), if the death was observed as it happened.
        """
        contents = self._reader.refresh()
        producer = self.outbox.producer()
        if producer is not None and producer != ended and self.outbox.may_have_live_producer():
            return
        if not contents.is_running or not self.sent.run_id or self._runs is None:
            return
        with tracking_errors(self.address):
            # Not later than now: the journal may come from a host whose clock is ahead.
            died_ms = min(max(contents.last_ms, now_ms), int(time.time() * 1000))
            self._runs.mark_killed(self.sent.run_id, self.sent.parent_id, contents.statuses[-1][1], died_ms)
            self._store_sent(num_judged=len(contents.statuses))

    def _sync_or_reset(self) -> None:
        try:
            self._sync()
        except Exception:
            # It is unknown whether the failed call took effect: connect again and compare with MLflow first.
            self._client, self._must_compare = None, True
            self._known_steps.clear()
            raise

    def _sync(self) -> None:
        contents = self._reader.refresh()
        if contents.num_damaged > self._num_damaged:
            self._num_damaged = contents.num_damaged
            self._warn(f"{self.outbox.journal}: damaged lines skipped: {contents.num_damaged}")
            # The entries behind a damaged line have moved up, so the stored counts are invalid. Points are
            # compared with MLflow's history; datasets and files replace themselves, and statuses are compared
            # by time.
            self._must_compare = True
            counts = ("points", "datasets", "files", "models", "summaries", "statuses")
            self._store_sent(**{f"num_{name}": 0 for name in counts})
        if self._client is None:
            self._client = connect(self.address, on_answer=self._on_answer)
            started_ms = contents.statuses[0][1] if contents.statuses else None
            self._runs = Runs(self._client, self.address, self.origin, started_ms)
            self._open_runs()
        while self.sent.num_points < len(contents.final):
            start = self.sent.num_points
            self._send_points(contents.final[start : start + _BATCH_POINTS])
        while self.sent.num_datasets < len(contents.datasets):
            self._send_dataset(contents.datasets[self.sent.num_datasets])
            self._store_sent(num_datasets=self.sent.num_datasets + 1)
        while self.sent.num_files < len(contents.files):
            file = contents.files[self.sent.num_files]
            run_id = self.sent.run_id if file.target == "run" else self.sent.parent_id
            self._send_file(run_id or self.sent.run_id, file.path)
            self._store_sent(num_files=self.sent.num_files + 1)
        while self.sent.num_models < len(contents.models):
            self._send_model(contents.models[self.sent.num_models])
            self._store_sent(num_models=self.sent.num_models + 1)
        while self.sent.num_summaries < len(contents.summaries):
            self._send_summary(contents.summaries[self.sent.num_summaries])
            self._store_sent(num_summaries=self.sent.num_summaries + 1)
        self._must_compare = False
        self._known_steps.clear()
        # The status comes last, so that a run which MLflow shows as FINISHED is complete. Only the last
        # status counts.
        if self.sent.num_statuses < len(contents.statuses):
            if self._runs.find(self.sent.run_id) is None:
                # Deleted since it was opened, and `set_status` skips deleted runs: send everything to a new
                # one.
                self._open_runs()
                self._sync()
                return
            status, time_ms = contents.statuses[-1]
            if status == "REFUSED":
                self._runs.withdraw(self.sent.run_id, self.sent.parent_id, time_ms)
            else:
                self._runs.set_status(self.sent.run_id, self.sent.parent_id, status, time_ms)
                if contents.num_tries > 1:
                    self._runs.set_tries(self.sent.run_id, contents.num_tries)
            self._store_sent(num_statuses=len(contents.statuses))

    def _store_sent(self, **changes: Any) -> None:
        self.sent = self.sent.model_copy(update={"outbox": self.origin.id, **changes})
        self.outbox.write_sent(self.sent)

    # --- runs ---------------------------------------------------------------------------------------

    def _open_runs(self) -> None:
        """Find or create the pipeline's run and the stage's run below it; add missing parameters and tags."""
        origin, sent, runs = self.origin, self.sent, self._runs
        run_id, parent_id = sent.run_id, sent.parent_id
        if not run_id and origin.given_run_id:
            run_id = origin.given_run_id
        own = runs.find(run_id) if run_id else None
        if own is not None and not sent.run_id:
            parent_id = own.data.tags.get("mlflow.parentRunId", "")
        parent = runs.find(parent_id) if parent_id else None
        if run_id and own is None:
            variable = " (MLFLOW_RUN_ID)" if run_id == origin.given_run_id else ""
            self._warn(f"MLflow run {run_id}{variable} does not exist or was deleted; creating a new run")
        if own is None:
            experiment = runs.experiment()
            parent_id = parent_id if parent is not None else runs.pipeline_run(experiment)
            run_id = runs.stage_run(experiment, parent_id)
        elif parent is None and run_id == origin.given_run_id:
            # The run was created by Kubeflow's MLflow plugin, which also arranges its parents.
            parent_id = ""
        elif parent is None and parent_id:
            self._warn(f"MLflow run {parent_id} of the pipeline was deleted; creating a new run")
            parent_id = runs.pipeline_run(own.info.experiment_id)
            runs.set_parent(run_id, parent_id)
        self._store_runs(run_id, parent_id)
        runs.add_missing(run_id, origin.params, stage_tags(origin))
        if parent_id:
            shared = {PREFIX + key: origin.tags[key] for key in ("recipe", "profile") if key in origin.tags}
            runs.add_missing(parent_id, origin.pipeline_params, shared)

    def _store_runs(self, run_id: str, parent_id: str) -> None:
        """Store the run IDs; for a run that replaces another one, reset its counts of records."""
        changes: dict[str, Any] = {"run_id": run_id, "parent_id": parent_id}
        if self.sent.run_id and run_id != self.sent.run_id:
            changes |= {
                "num_points": 0,
                "num_datasets": 0,
                "num_files": 0,
                "num_models": 0,
                "num_statuses": 0,
            }
        if self.sent.run_id and parent_id != self.sent.parent_id:
            # One count covers the files of both runs; those of the stage's run are uploaded again and
            # replaced.
            changes |= {"num_files": 0, "num_summaries": 0, "num_statuses": 0}
        if any(getattr(self.sent, key) != value for key, value in changes.items()):
            self._store_sent(**changes)

    # --- records ------------------------------------------------------------------------------------

    def _send_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        run_id = self.sent.run_id
        names = {metric_name(p.name) for p in points}
        # Only when MLflow may have them already: the comparison costs one call per metric.
        known = self._compared_steps(run_id, names) if self._must_compare else {}
        new = [p for p in points if p.step not in known.get(metric_name(p.name), ())]
        if new:
            metrics = [Metric(metric_name(p.name), p.value, p.time_ms, p.step) for p in new]
            self._client.log_batch(run_id, metrics=metrics)
        self._store_sent(num_points=self.sent.num_points + len(points))

    def _compared_steps(self, run_id: str, names: set[str]) -> dict[str, set[int]]:
        """Steps that the run has in MLflow, by metric; each history is fetched once."""
        missing = names - set(self._known_steps)
        known = self._client.get_run(run_id).data.metrics if missing else {}
        for name in missing:
            history = self._client.get_metric_history(run_id, name) if name in known else ()
            self._known_steps[name] = {metric.step for metric in history}
        return self._known_steps

    def _send_dataset(self, used: UsedDataset) -> None:
        # MLflow identifies a dataset by name and digest, and does not add one twice to a run: no comparison
        # needed.
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # Outboxes of earlier versions may hold credentials, so they are removed here too.
        source_type, source = dataset_source(hidden(used.source))
        dataset = Dataset(
            name=used.name[:MAX_DATASET_NAME_LENGTH],
            digest=used.digest[:MAX_DIGEST_LENGTH],
            source_type=source_type,
            source=json.dumps(source),
            # The digest again, because MLflow's field takes 36 characters of its 64.
            profile=json.dumps({**without_credentials(used.facts), "digest": used.digest}),
        )
        context = InputTag(key="mlflow.data.context", value=used.context)
        # The pipeline's run lists them, too; MLflow drops what a run has already.
        for run_id in dict.fromkeys((self.sent.run_id, self.sent.parent_id)):
            if run_id:
                self._client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[context])])

    def _send_file(self, run_id: str, path: str) -> None:
        local = self.outbox.files / path
        if not local.is_file():
            self._warn(f"{local} no longer exists; skipped")
            return
        folder = str(Path(path).parent)
        self._client.log_artifact(run_id, str(local), None if folder == "." else folder)
        if local.suffix == ".json" and folder == "tables":
            # As `mlflow.log_table` does: the user interface lists tables by this tag.
            tags = self._client.get_run(run_id).data.tags
            logged = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
            entry = {"path": path, "type": "table"}
            if entry not in logged:
                self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def _send_model(self, model: OfferedModel) -> None:
        folder = self.outbox.files / MODEL_FOLDER
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            self._warn(f"{folder / missing[0]} no longer exists; {model.name} is not registered")
            return
        self._registry().add(self.sent.run_id, model, folder)

    def _send_summary(self, summary: PipelineSummary) -> None:
        from mlflow.entities import Metric, RunTag

        parent_id = self.sent.parent_id or self.sent.run_id
        tags = {**summary.tags, f"{PREFIX}cached": self._cached_stages(parent_id, summary.tags)}
        known = self._summary_metrics(parent_id, summary) if self._must_compare else set()
        items = [
            Metric(metric_name(name), value, summary.time_ms, 0)
            for name, value in summary.metrics.items()
            if metric_name(name) not in known
        ]
        labels = [RunTag(key, hidden(value)[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        for some_items, some_labels in in_batches(items, labels):
            self._client.log_batch(parent_id, metrics=some_items, tags=some_labels)
        for run_id, card in summary.cards.items():
            self._registry().replace_card(run_id, card)

    def _registry(self) -> Registry:
        return Registry(self._client, str(self.address), self._warn)

    def _summary_metrics(self, parent_id: str, summary: PipelineSummary) -> set[str]:
        """Metrics of this summary that the pipeline's run already has."""
        # All summaries of a pipeline are at step 0, so the time tells this one from those of earlier runs.
        known = self._client.get_run(parent_id).data.metrics
        names = {metric_name(name) for name in summary.metrics} & set(known)
        return {
            name
            for name in names
            if any(m.timestamp == summary.time_ms for m in self._client.get_metric_history(parent_id, name))
        }

    def _cached_stages(self, parent_id: str, tags: Mapping[str, str]) -> str:
        """Stages whose outputs were reused: their runs belong to another pipeline run."""
        cached = []
        for key, run_id in tags.items():
            if not key.startswith(f"{PREFIX}run.") or not run_id:
                continue
            run = self._runs.find(run_id)
            if run is None or run.data.tags.get("mlflow.parentRunId") != parent_id:
                cached.append(key.removeprefix(f"{PREFIX}run."))
        return ", ".join(cached)
