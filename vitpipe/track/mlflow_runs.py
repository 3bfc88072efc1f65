"""The MLflow runs of one outbox: found or created, completed, and updated in status.

A run may have been deleted in MLflow meanwhile, and a process that was taken for dead may have been followed
by another one. So a run is read before anything about it is decided, and every status is stored with the time
at which it was true: an older status never replaces a later one.
"""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitpipe.contracts.address import Address, hidden
from vitpipe.track.journal import Status
from vitpipe.track.mlflow_names import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, PREFIX, metric_name
from vitpipe.track.outbox import Origin
from vitpipe.track.runs_view import share_view
from vitpipe.track.server import does_not_exist, experiment_id, given_experiment

_BATCH_SIZE = (
    100  # MAX_PARAMS_TAGS_PER_BATCH of mlflow/utils/validation.py (3.17): params or tags per log_batch
)
# These tag names stay as they were when an outbox was called a box: runs of earlier versions are found by
# them.
OUTBOX_TAG = f"{PREFIX}box"
STATUS_TIME, STATUS_OUTBOX = f"{PREFIX}status_ms", f"{PREFIX}status_box"


def _user() -> dict[str, str]:
    # A container may run as a number that has no name: KeyError, from Python 3.13 on OSError.
    with contextlib.suppress(KeyError, OSError):
        return {"mlflow.user": getpass.getuser()}
    return {}


_WHO = _user()


class Runs:
    """Finds, creates and updates the runs that belong to an outbox."""

    def __init__(self, client: Any, address: Address, origin: Origin, started_ms: int | None) -> None:
        self._client, self._address, self._origin, self._started_ms = client, address, origin, started_ms

    def find(self, run_id: str) -> Any:
        """Read a run; None when it was deleted or does not exist."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if does_not_exist(error):
                return None
            raise
        # MLflow's deletion only sets the stage; `get_run` still returns the run until `mlflow gc` removes it.
        return None if run.info.lifecycle_stage == "deleted" else run

    def experiment(self) -> str:
        """ID of the experiment for new runs. Raises TrackingError when it was deleted."""
        if self._origin.experiment_id:
            return given_experiment(self._client, self._address, self._origin.experiment_id)
        return experiment_id(self._client, self._address, self._origin.experiment)

    def pipeline_run(self, experiment: str) -> str:
        """ID of the pipeline's run, which is created if it does not exist."""
        tags = {f"{PREFIX}role": "pipeline", f"{PREFIX}pipeline": self._origin.pipeline}
        found = self._search(experiment, tags)
        if found:
            return found[0]
        share_view(self._client, experiment)
        made = self._create(experiment, tags, self._origin.pipeline_title, "vitpipe")
        # MLflow cannot create a run only if none exists, so two stages may create one each at the same time.
        # Both then see both runs and choose the same one, the oldest; the other is deleted by its creator.
        first = (self._search(experiment, tags) or [made])[0]
        if first != made:
            self._client.delete_run(made)
        return first

    def stage_run(self, experiment: str, parent_id: str) -> str:
        """ID of the outbox's run, which is created as child of the pipeline's run if it does not exist."""
        found = self._search(experiment, {OUTBOX_TAG: self._origin.id})
        if found:
            self.set_parent(found[0], parent_id)
            return found[0]
        tags = {OUTBOX_TAG: self._origin.id, "mlflow.parentRunId": parent_id}
        title = f"{self._origin.stage}: {self._origin.pipeline_title}"
        return self._create(experiment, tags, title, f"vitpipe run {self._origin.stage}")

    def set_parent(self, run_id: str, parent_id: str) -> None:
        """Nest a run below another one."""
        self.add_missing(run_id, {}, {"mlflow.parentRunId": parent_id})

    def add_missing(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log the parameters that the run lacks, and the tags that it lacks or that differ."""
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(run_id).data
        # An existing parameter keeps its value: MLflow rejects a batch that changes one.
        new_params = [
            Param(metric_name(key), hidden(value)[:MAX_PARAM_LENGTH])
            for key, value in params.items()
            if metric_name(key) not in data.params
        ]
        shown = {key: hidden(value)[:MAX_TAG_LENGTH] for key, value in tags.items()}
        new_tags = [RunTag(key, value) for key, value in shown.items() if data.tags.get(key) != value]
        for some_params, some_tags in in_batches(new_params, new_tags):
            self._client.log_batch(run_id, params=some_params, tags=some_tags)

    def set_status(self, run_id: str, parent_id: str, status: Status, time_ms: int) -> None:
        """Set the status of the outbox's and the pipeline's run, unless a later one is stored there."""
        for run in self._own_and_pipeline(run_id, parent_id):
            if self._status_ms(run) > time_ms:
                continue
            self._client.log_batch(run.info.run_id, tags=self._status_tags(time_ms))
            if status == "RUNNING":
                # `set_terminated` would also write an end time, by default the present.
                self._client.update_run(run.info.run_id, status=status)
            else:
                self._client.set_terminated(run.info.run_id, status, time_ms)

    def set_tries(self, run_id: str, number: int) -> None:
        """Say how many processes have worked on a stage's run: one more with every retry and resume."""
        self._client.set_tag(run_id, f"{PREFIX}tries", str(number))

    def withdraw(self, run_id: str, parent_id: str, time_ms: int) -> None:
        """Delete the outbox's run, and the pipeline's run where no stage is left below it."""
        found = list(self._own_and_pipeline(run_id, parent_id))
        if any(run.info.run_id == run_id for run in found):
            self._client.delete_run(run_id)
        for run in found:
            if run.info.run_id == run_id:
                continue
            if self._search(run.info.experiment_id, {"mlflow.parentRunId": parent_id}):
                # As between two stages: what ran before has finished, the rest follows when it is corrected.
                self._client.log_batch(parent_id, tags=self._status_tags(time_ms))
                self._client.set_terminated(parent_id, "FINISHED", time_ms)
            else:
                self._client.delete_run(parent_id)

    def mark_killed(self, run_id: str, parent_id: str, running_ms: int, died_ms: int) -> None:
        """Set the runs to KILLED that are still RUNNING in MLflow and that no other process has continued.

        Args:
            running_ms: when the dead process recorded RUNNING (milliseconds since the epoch).
            died_ms: when it died, as far as is known (milliseconds since the epoch).
        """
        for run in self._own_and_pipeline(run_id, parent_id):
            # The pipeline's run belongs to the stage that set its status last, and that may still be running.
            is_ours = run.data.tags.get(STATUS_OUTBOX, self._origin.id) == self._origin.id
            if run.info.status == "RUNNING" and is_ours and self._status_ms(run) <= running_ms:
                # Not `died_ms`: the RUNNING of a resumed run must count as later, and its time is only
                # guaranteed to be after `running_ms` (see JournalContents).
                self._client.log_batch(run.info.run_id, tags=self._status_tags(running_ms))
                self._client.set_terminated(run.info.run_id, "KILLED", max(died_ms, running_ms))

    def _own_and_pipeline(self, run_id: str, parent_id: str) -> Iterator[Any]:
        """The outbox's run and the pipeline's run as they are in MLflow now, without deleted ones."""
        own = self.find(run_id)
        if own is not None:
            yield own
        parent = self.find(parent_id) if parent_id else None
        # A parent without this tag was created by Kubeflow's MLflow plugin, which ends it itself.
        if parent is not None and parent.data.tags.get(f"{PREFIX}role") == "pipeline":
            yield parent

    def _status_ms(self, run: Any) -> int:
        value = run.data.tags.get(STATUS_TIME, "")
        return int(value) if value.isdigit() else 0

    def _status_tags(self, time_ms: int) -> list[Any]:
        from mlflow.entities import RunTag

        return [RunTag(STATUS_TIME, str(time_ms)), RunTag(STATUS_OUTBOX, self._origin.id)]

    def _create(self, experiment: str, tags: Mapping[str, str], title: str, source: str) -> str:
        run = self._client.create_run(
            experiment,
            # The start of the stage. By default MLflow takes the present, which may be days later for an
            # outbox that is sent by `vitpipe sync`.
            start_time=self._started_ms,
            tags={**tags, **_WHO, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"},
            run_name=title,
        )
        return str(run.info.run_id)

    def _search(self, experiment: str, tags: Mapping[str, str]) -> list[str]:
        """IDs of the runs with these tags, the oldest first; MLflow leaves deleted runs out by default."""
        text = " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items())
        runs = self._client.search_runs([experiment], filter_string=text, max_results=50)
        # The run ID decides between equal start times, so that all processes choose the same run.
        return [run.info.run_id for run in sorted(runs, key=lambda r: (r.info.start_time, r.info.run_id))]


def in_batches(first: Sequence[Any], second: Sequence[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Cut two lists in parallel into pieces that one call of `log_batch` accepts."""
    for start in range(0, max(len(first), len(second)), _BATCH_SIZE):
        yield list(first[start : start + _BATCH_SIZE]), list(second[start : start + _BATCH_SIZE])


def _quoted(value: str) -> str:
    # A quote would end the string in MLflow's filter; the tag `pipeline` is stored without quotes too.
    return value.replace("'", "")
