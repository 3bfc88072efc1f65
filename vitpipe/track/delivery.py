"""Tell MLflow what is in an outbox: every final point exactly once, whatever was killed in between.

Three places can be interrupted, and all are looked after:

* between making the MLflow run and writing down its number: the run carries the outbox's random id as a
  tag and is searched for before another one is made;
* between sending points and writing down that they were sent: after a restart, or when a call failed
  with unknown outcome, the run's own history says which of the next points are there already;
* between two sendings somebody may delete the run: another one is made, and everything is sent to it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import hidden
from vitpipe.track.journal import JournalReader, Point, Summary, UsedDataset, without_credentials
from vitpipe.track.mlflow_names import (
    LONGEST_DATASET_NAME,
    LONGEST_DIGEST,
    LONGEST_TAG,
    PREFIX,
    metric_name,
    place_of,
    stage_tags,
)
from vitpipe.track.mlflow_runs import Runs, in_batches
from vitpipe.track.outbox import Outbox, Sent
from vitpipe.track.producer import Producer
from vitpipe.track.server import (
    address_in_environment,
    address_to_use,
    connect,
    does_not_exist,
    tracking_errors,
)

_BATCH_POINTS = 1000  # MLflow's log_batch takes no more


def to_stderr(line: str) -> None:
    """Print a line where it is in nobody's way."""
    print(hidden(line), file=sys.stderr, flush=True)


class Delivery:
    """Sends one outbox; call `sync` as often as you like. The caller holds the outbox's lock.

    Args:
        say: is given a line when something should be known that stops nothing.
        answered: called as soon as MLflow is known to be there.

    Raises:
        OSError, DamagedError: from the constructor, when there is no whole outbox.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        say: Callable[[str], None] = to_stderr,
        answered: Callable[[], None] | None = None,
    ) -> None:
        self.outbox, self.origin = outbox, outbox.origin()
        sent = outbox.sent()
        if sent is None:
            say(f"{outbox.folder} no longer knows what was sent (its sent.json is damaged); MLflow is asked")
        self.sent = sent if sent is not None else Sent()
        # With a damaged sent.json nobody knows whether the run is in MLflow, so the address stays as well.
        is_told = sent is None or bool(sent.run_id)
        self.store = address_to_use(self.origin.store, address_in_environment(), is_told=is_told)
        self._say, self._answered = say, answered
        self._reader = JournalReader(outbox.journal)
        self._client: Any = None
        self._runs: Any = None
        self._unsure = True  # whether points after the cursor may be in MLflow already
        self._there: dict[str, set[int]] = {}  # name -> steps that the run had when we became unsure
        self._num_damaged = 0

    def sync(self) -> None:
        """Send everything that is final.

        Raises:
            TrackingError: MLflow does not answer or refuses; what it did not get stays to be sent.
            StorageError: the disk refuses to take down what was sent.
        """
        if self._synced_or_run_is_gone():
            return
        with tracking_errors(self.store):  # the run was deleted a moment ago: once more, with a new one
            self._guarded_sync()

    def mark_killed(self, *, ended: Producer | None = None, now_ms: int = 0) -> None:
        """The stage died without a word: say so, unless its last word was another one. Raises as `sync`.

        A run that another process has taken up meanwhile, or that is not running in MLflow, stays as it is.

        Args:
            ended: a process that is known to have died.
            now_ms: the present, when its death was noticed as it happened.
        """
        ledger = self._reader.refresh()
        producer = self.outbox.producer()
        if producer is not None and producer != ended and self.outbox.may_be_filled():
            return
        is_running = bool(ledger.statuses) and ledger.statuses[-1][0] == "RUNNING"
        if not is_running or not self.sent.run_id or self._runs is None:
            return
        with tracking_errors(self.store):
            died_ms = min(max(ledger.last_ms, now_ms), int(time.time() * 1000))
            self._runs.mark_killed(self.sent.run_id, self.sent.parent_id, ledger.statuses[-1][1], died_ms)
            self._note(num_judged=len(ledger.statuses))

    def _synced_or_run_is_gone(self) -> bool:
        """False when MLflow refused because a run is no longer there."""
        with tracking_errors(self.store):
            try:
                self._guarded_sync()
            except Exception as error:
                if not self.sent.run_id or not does_not_exist(error):
                    raise
                return False
        return True

    def _guarded_sync(self) -> None:
        try:
            self._sync()
        except Exception:
            self._client, self._unsure = None, True
            self._there.clear()
            raise

    def _sync(self) -> None:
        ledger = self._reader.refresh()
        if ledger.num_damaged > self._num_damaged:
            self._num_damaged = ledger.num_damaged
            self._say(f"{self.outbox.journal}: damaged lines that were passed over: {ledger.num_damaged}")
            # Entries have moved up, so their counts say nothing; what MLflow has is asked for.
            self._unsure = True
            self._note(num_points=0, num_datasets=0, num_files=0, num_summaries=0, num_statuses=0)
        if self._client is None:
            self._client = connect(self.store, answered=self._answered)
            started_ms = ledger.statuses[0][1] if ledger.statuses else None
            self._runs = Runs(self._client, self.store, self.origin, started_ms)
            self._open_runs()
        while self.sent.num_points < len(ledger.final):
            start = self.sent.num_points
            self._send_points(ledger.final[start : start + _BATCH_POINTS])
        while self.sent.num_datasets < len(ledger.datasets):
            self._send_dataset(ledger.datasets[self.sent.num_datasets])
            self._note(num_datasets=self.sent.num_datasets + 1)
        while self.sent.num_files < len(ledger.files):
            file = ledger.files[self.sent.num_files]
            run_id = self.sent.run_id if file.target == "run" else self.sent.parent_id
            self._send_file(run_id or self.sent.run_id, file.path)
            self._note(num_files=self.sent.num_files + 1)
        while self.sent.num_summaries < len(ledger.summaries):
            self._send_summary(ledger.summaries[self.sent.num_summaries])
            self._note(num_summaries=self.sent.num_summaries + 1)
        self._unsure = False
        self._there.clear()
        if self.sent.num_statuses < len(ledger.statuses):
            if self._runs.find(self.sent.run_id) is None:
                self._open_runs()  # deleted since it was opened: everything goes to a new one
                self._sync()
                return
            self._runs.set_status(self.sent.run_id, self.sent.parent_id, *ledger.statuses[-1])
            self._note(num_statuses=len(ledger.statuses))

    def _note(self, **changes: Any) -> None:
        self.sent = self.sent.model_copy(update={"outbox": self.origin.id, **changes})
        self.outbox.write_sent(self.sent)

    # --- runs ---------------------------------------------------------------------------------------

    def _open_runs(self) -> None:
        """Find or make the pipeline's run and the stage's run below it; complete parameters and tags."""
        origin, sent, runs = self.origin, self.sent, self._runs
        run_id, parent_id = sent.run_id, sent.parent_id
        if not run_id and origin.given_run_id:
            run_id = origin.given_run_id
        own = runs.find(run_id) if run_id else None
        if own is not None and not sent.run_id:
            parent_id = own.data.tags.get("mlflow.parentRunId", "")
        parent = runs.find(parent_id) if parent_id else None
        if run_id and own is None:
            by_whom = " (MLFLOW_RUN_ID)" if run_id == origin.given_run_id else ""
            self._say(
                f"MLflow's run {run_id}{by_whom} does not exist or was deleted; a new run takes its place"
            )
        if own is None:
            experiment = runs.experiment()
            parent_id = parent_id if parent is not None else runs.pipeline_run(experiment)
            run_id = runs.stage_run(experiment, parent_id)
        elif parent is None and run_id == origin.given_run_id:
            parent_id = ""  # Kubeflow's runs are not ours to put in order
        elif parent is None and parent_id:
            self._say(f"MLflow's run {parent_id} of the pipeline was deleted; a new run takes its place")
            parent_id = runs.pipeline_run(own.info.experiment_id)
            runs.put_below(run_id, parent_id)
        self._start_again(run_id, parent_id)
        runs.complete(run_id, origin.params, stage_tags(origin))
        if parent_id:
            shared = {PREFIX + key: origin.tags[key] for key in ("recipe", "profile") if key in origin.tags}
            runs.complete(parent_id, origin.pipeline_params, shared)

    def _start_again(self, run_id: str, parent_id: str) -> None:
        """Write the runs down; one that replaces another has been told nothing yet."""
        changes: dict[str, Any] = {"run_id": run_id, "parent_id": parent_id}
        if self.sent.run_id and run_id != self.sent.run_id:
            changes |= {"num_points": 0, "num_datasets": 0, "num_files": 0, "num_statuses": 0}
        if self.sent.run_id and parent_id != self.sent.parent_id:
            changes |= {"num_files": 0, "num_summaries": 0, "num_statuses": 0}
        if any(getattr(self.sent, key) != value for key, value in changes.items()):
            self._note(**changes)

    # --- what is sent -------------------------------------------------------------------------------

    def _send_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        run_id = self.sent.run_id
        there = self._already_there(run_id, {metric_name(p.name) for p in points}) if self._unsure else {}
        new = [p for p in points if p.step not in there.get(metric_name(p.name), ())]
        if new:
            metrics = [Metric(metric_name(p.name), p.value, p.time_ms, p.step) for p in new]
            self._client.log_batch(run_id, metrics=metrics)
        self._note(num_points=self.sent.num_points + len(points))

    def _already_there(self, run_id: str, names: set[str]) -> dict[str, set[int]]:
        unknown = names - set(self._there)
        known = self._client.get_run(run_id).data.metrics if unknown else {}
        for name in unknown:
            history = self._client.get_metric_history(run_id, name) if name in known else ()
            self._there[name] = {metric.step for metric in history}
        return self._there

    def _send_dataset(self, used: UsedDataset) -> None:
        """MLflow knows a dataset by name and digest; one that the run has already is not added again."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type, source = place_of(hidden(used.source))
        dataset = Dataset(
            name=used.name[:LONGEST_DATASET_NAME],
            digest=used.digest[:LONGEST_DIGEST],
            source_type=source_type,
            source=json.dumps(source),
            profile=json.dumps({**without_credentials(used.facts), "digest": used.digest}),
        )
        context = InputTag(key="mlflow.data.context", value=used.context)
        self._client.log_inputs(self.sent.run_id, datasets=[DatasetInput(dataset=dataset, tags=[context])])

    def _send_file(self, run_id: str, path: str) -> None:
        local = self.outbox.files / path
        if not local.is_file():
            self._say(f"{local} is no longer there and was passed over")
            return
        folder = str(Path(path).parent)
        self._client.log_artifact(run_id, str(local), None if folder == "." else folder)
        if local.suffix == ".json" and folder == "tables":
            tags = self._client.get_run(run_id).data.tags
            logged = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
            entry = {"path": path, "type": "table"}  # what mlflow.log_table writes: the UI lists tables by it
            if entry not in logged:
                self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def _send_summary(self, summary: Summary) -> None:
        from mlflow.entities import Metric, RunTag

        parent_id = self.sent.parent_id or self.sent.run_id
        tags = {**summary.tags, f"{PREFIX}cached": self._cached(parent_id, summary.tags)}
        there = self._summary_times(parent_id, summary) if self._unsure else set()
        items = [
            Metric(metric_name(name), value, summary.time_ms, 0)
            for name, value in summary.metrics.items()
            if metric_name(name) not in there
        ]
        labels = [RunTag(key, hidden(value)[:LONGEST_TAG]) for key, value in tags.items()]
        for some_items, some_labels in in_batches(items, labels):
            self._client.log_batch(parent_id, metrics=some_items, tags=some_labels)

    def _summary_times(self, parent_id: str, summary: Summary) -> set[str]:
        """Metrics of a summary that the pipeline's run has already, beside older ones of the same names."""
        known = self._client.get_run(parent_id).data.metrics
        names = {metric_name(name) for name in summary.metrics} & set(known)
        return {
            name
            for name in names
            if any(m.timestamp == summary.time_ms for m in self._client.get_metric_history(parent_id, name))
        }

    def _cached(self, parent_id: str, tags: Mapping[str, str]) -> str:
        """Stages whose run belongs to another pipeline run, because nothing had changed since."""
        cached = []
        for key, run_id in tags.items():
            if not key.startswith(f"{PREFIX}run.") or not run_id:
                continue
            run = self._runs.find(run_id)
            if run is None or run.data.tags.get("mlflow.parentRunId") != parent_id:
                cached.append(key.removeprefix(f"{PREFIX}run."))
        return ", ".join(cached)
