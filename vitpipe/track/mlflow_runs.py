"""The MLflow runs of one outbox: found again or made, completed, and their statuses set with care.

A run may have been deleted in MLflow since; a process that was thought dead may have been followed by
another one. So a run is looked at before anything about it is decided, and every status that we set
carries the moment at which it was true: an older one never replaces a younger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitpipe.contracts.address import Address, hidden
from vitpipe.track.journal import Status
from vitpipe.track.mlflow_names import LONGEST_PARAM, LONGEST_TAG, PREFIX, metric_name
from vitpipe.track.outbox import Origin
from vitpipe.track.server import does_not_exist, experiment_id, given_experiment

BATCH = 100  # log_batch takes so many parameters or tags at once
# Named when an outbox was called a box: runs of earlier versions are found by it.
OUTBOX_TAG = f"{PREFIX}box"
STATUS_TIME, STATUS_OUTBOX = f"{PREFIX}status_ms", f"{PREFIX}status_box"


class Runs:
    """Finds, makes and changes the runs that belong to an outbox."""

    def __init__(self, client: Any, store: Address, origin: Origin, started_ms: int | None) -> None:
        self._client, self._store, self._origin, self._started_ms = client, store, origin, started_ms

    def find(self, run_id: str) -> Any:
        """A run as it is now; None when it was deleted or has never been there."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if does_not_exist(error):
                return None
            raise
        return None if run.info.lifecycle_stage == "deleted" else run

    def experiment(self) -> str:
        """Number of the experiment for new runs. Raises TrackingError when it was deleted."""
        if self._origin.experiment_id:
            return given_experiment(self._client, self._store, self._origin.experiment_id)
        return experiment_id(self._client, self._store, self._origin.experiment)

    def pipeline_run(self, experiment: str) -> str:
        """The run of the pipeline, made if need be."""
        tags = {f"{PREFIX}role": "pipeline", f"{PREFIX}pipeline": self._origin.pipeline}
        found = self._search(experiment, tags)
        if found:
            return found[0]
        made = self._create(experiment, tags, self._origin.pipeline_title)
        first = (self._search(experiment, tags) or [made])[0]
        if first != made:  # another stage was faster by a moment: keep one
            self._client.delete_run(made)
        return first

    def stage_run(self, experiment: str, parent_id: str) -> str:
        """The run of the outbox, made below the pipeline's run if need be."""
        found = self._search(experiment, {OUTBOX_TAG: self._origin.id})
        if found:
            self.put_below(found[0], parent_id)
            return found[0]
        tags = {OUTBOX_TAG: self._origin.id, "mlflow.parentRunId": parent_id}
        return self._create(experiment, tags, self._origin.stage)

    def put_below(self, run_id: str, parent_id: str) -> None:
        """Show a run below another one."""
        self.complete(run_id, {}, {"mlflow.parentRunId": parent_id})

    def complete(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log what the run lacks. A parameter that is there stays: MLflow refuses to change one."""
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(run_id).data
        new_params = [
            Param(metric_name(key), hidden(value)[:LONGEST_PARAM])
            for key, value in params.items()
            if metric_name(key) not in data.params
        ]
        shown = {key: hidden(value)[:LONGEST_TAG] for key, value in tags.items()}
        new_tags = [RunTag(key, value) for key, value in shown.items() if data.tags.get(key) != value]
        for some_params, some_tags in in_batches(new_params, new_tags):
            self._client.log_batch(run_id, params=some_params, tags=some_tags)

    def set_status(self, run_id: str, parent_id: str, status: Status, time_ms: int) -> None:
        """Set the status of the outbox's run and of the pipeline's, unless a younger one is there."""
        for run in self._both(run_id, parent_id):
            if self._told_ms(run) > time_ms:
                continue
            self._client.log_batch(run.info.run_id, tags=self._signature(time_ms))
            if status == "RUNNING":
                self._client.update_run(run.info.run_id, status=status)
            else:
                self._client.set_terminated(run.info.run_id, status, time_ms)

    def mark_killed(self, run_id: str, parent_id: str, running_ms: int, died_ms: int) -> None:
        """Mark what still runs in MLflow, and was not taken up by another process since, as killed.

        Args:
            running_ms: when the process that died said that it runs.
            died_ms: when it died, as far as is known.
        """
        for run in self._both(run_id, parent_id):
            is_ours = run.data.tags.get(STATUS_OUTBOX, self._origin.id) == self._origin.id
            if run.info.status == "RUNNING" and is_ours and self._told_ms(run) <= running_ms:
                # Not the time of death: whoever resumes the run says so later than this in any case.
                self._client.log_batch(run.info.run_id, tags=self._signature(running_ms))
                self._client.set_terminated(run.info.run_id, "KILLED", max(died_ms, running_ms))

    def _both(self, run_id: str, parent_id: str) -> Iterator[Any]:
        """The outbox's run and the pipeline's as they are now; a run of Kubeflow's is ended by its plugin."""
        own = self.find(run_id)
        if own is not None:
            yield own
        parent = self.find(parent_id) if parent_id else None
        if parent is not None and parent.data.tags.get(f"{PREFIX}role") == "pipeline":
            yield parent

    def _told_ms(self, run: Any) -> int:
        told = run.data.tags.get(STATUS_TIME, "")
        return int(told) if told.isdigit() else 0

    def _signature(self, time_ms: int) -> list[Any]:
        from mlflow.entities import RunTag

        return [RunTag(STATUS_TIME, str(time_ms)), RunTag(STATUS_OUTBOX, self._origin.id)]

    def _create(self, experiment: str, tags: Mapping[str, str], title: str) -> str:
        """Make a run that started when the stage did, not when MLflow hears of it."""
        run = self._client.create_run(
            experiment,
            start_time=self._started_ms,
            tags={**tags, "mlflow.source.name": "vitpipe", "mlflow.source.type": "LOCAL"},
            run_name=title,
        )
        return str(run.info.run_id)

    def _search(self, experiment: str, tags: Mapping[str, str]) -> list[str]:
        """Runs that carry these tags, the oldest first; deleted ones are not among them."""
        text = " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items())
        runs = self._client.search_runs([experiment], filter_string=text, max_results=50)
        return [run.info.run_id for run in sorted(runs, key=lambda r: (r.info.start_time, r.info.run_id))]


def in_batches(first: Sequence[Any], second: Sequence[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Cut two lists side by side into pieces that one call of MLflow takes."""
    for start in range(0, max(len(first), len(second)), BATCH):
        yield list(first[start : start + BATCH]), list(second[start : start + BATCH])


def _quoted(value: str) -> str:
    return value.replace("'", "")
