"""The task at the end of a pipeline run, whatever became of the others.

After a failure it writes the report of what has finished, and marks the MLflow runs of pods that died: a pod
without a node cannot say so itself. The run of Kubeflow still ends as failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import is_marked
from vitpipe.contracts.files import remove
from vitpipe.stages.executor import ExecutorIO
from vitpipe.stages.pipeline_run import CONCLUSION, STATUS
from vitpipe.stages.run import node_of, run_stage
from vitpipe.stages.run_records import records_of
from vitpipe.track.checked_json import DamagedError
from vitpipe.track.delivery import print_to_stderr
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.outbox import Outbox
from vitpipe.track.producer import STALE_SECONDS
from vitpipe.track.sync import outboxes_below, sync_pending

REPORT = "report"
_LOOK_SECONDS = 5.0
_SUCCEEDED = "SUCCEEDED"


def conclude(
    io: ExecutorIO,
    recipe: Recipe,
    states: Path | None,
    say: Callable[[str], None] = print_to_stderr,
) -> None:
    """Report on a run that has failed; on any other only say where its report is.

    Args:
        io: of the task; parameter `status` is Kubeflow's PipelineTaskFinalStatus.
        states: folder of all states, where stages have left their records; None in a local run, whose
            outputs lie together.
        say: writes a line to the log.

    Raises:
        ArtifactError, RecipeError, StorageError: as `run_stage`.
    """
    pipeline, failure = io.pipeline_run(CONCLUSION), failure_of(io.parameters().get(STATUS))
    out = io.output_folder()
    if not failure:
        if is_marked(out):
            remove(out)  # of a run that had failed and was resumed
        say("All stages have finished; the report is an output of the task 'report'.")
        io.finish_with_text("All stages have finished. The report is an output of the task 'report'.")
        return
    say(f"The run has failed: {failure}")
    if states is not None:
        mark_dead(states, {(recipe.name, recipe.profile)}, say)
    found = records_of(states, pipeline) if REPORT in recipe.stages else {}
    inputs = {
        name: found[feeder]
        for name, feeder in (node_of(recipe, REPORT).inputs.items() if found else ())
        if feeder in found
    }
    if not inputs:
        io.finish_with_text(f"The run has failed ({failure}). No stage has left results.")
        return
    say(f"Finished: {', '.join(inputs)}")
    metrics = run_stage(REPORT, recipe, inputs, out, states=states, pipeline=pipeline, needs_all=False)
    io.finish(metrics)


def failure_of(status: Any) -> str:
    """Why a run has failed, by Kubeflow's PipelineTaskFinalStatus; empty when it has not."""
    state = status.get("state", "unknown") if isinstance(status, dict) else "unknown"
    if state == _SUCCEEDED:
        return ""
    error = status.get("error") if isinstance(status, dict) else None
    said = str(error.get("message", "")).strip() if isinstance(error, dict) else ""
    return said or f"its state is {state}"


def mark_dead(states: Path, recipes: Collection[tuple[str, str]], say: Callable[[str], None]) -> None:
    """Deliver what the run's stages could not send, and mark the MLflow runs of dead ones KILLED.

    Args:
        recipes: name and profile of each recipe of the run.
    """
    # Another pod's process is known to be dead only by its missing heartbeats.
    until = time.monotonic() + STALE_SECONDS + 2 * _LOOK_SECONDS
    while any(box.may_have_live_producer() for box in _own(states, recipes)) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    try:
        num_sent = sync_pending(states)
    except TrackingError as error:
        say(f"MLflow has not been told: {error.what}")
    else:
        say(f"{num_sent} runs sent to MLflow")


def _own(states: Path, recipes: Collection[tuple[str, str]]) -> Iterator[Outbox]:
    """The outboxes of the recipes' stages."""
    # Not by the tag of the run: a stage that goes on from another run's state keeps that one's.
    for outbox in outboxes_below(states):
        with suppress(OSError, DamagedError):
            tags = outbox.origin().tags
            if (tags.get("recipe"), tags.get("profile")) in recipes:
                yield outbox
