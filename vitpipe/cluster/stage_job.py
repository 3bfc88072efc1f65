"""One stage of a pipeline as a job on several nodes: from the executor input to the executor output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitpipe.cluster.hand_over import STATES, HandOver
from vitpipe.cluster.job_api import JobApi
from vitpipe.cluster.launcher import run_job
from vitpipe.cluster.settings import TrainJobSettings
from vitpipe.cluster.train_job import check_shared, job_name, train_job
from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact, open_artifact
from vitpipe.contracts.errors import ArtifactError, InputError
from vitpipe.stages.executor import ExecutorIO
from vitpipe.stages.output_folders import check_output_folders
from vitpipe.stages.run import identity_of, node_of


def launch_stage(
    stage: str,
    recipe: Recipe,
    io: ExecutorIO,
    settings: TrainJobSettings,
    shared: Path,
    *,
    named: Sequence[str],
    states: Path | None = None,
) -> None:
    """Run a stage as a TrainJob and leave its folder and the executor output as `vitpipe run` does.

    Args:
        recipe: as the task's executor input gives it.
        shared: a folder on a claim that the launcher and the job see at the same path.
        named: `--recipe`, `--profile` and `--set` of the command line, for the job's own.
        states: folder of the training states on the claim, one per run in it; `SHARED/states` if not given.

    Raises:
        InputError: settings, inputs or the shared folder cannot be used.
        RunError: the job has failed.
        VitpipeError: as `run_job` and `HandOver`.
    """
    node = node_of(recipe, stage)
    _check_stage(stage, node.stage.resources.gpus, settings)
    check_shared(shared, settings)
    io.check_code(recipe, stage)
    inputs = _open(io.inputs(), node.inputs)
    out = io.output_folder()
    key = {
        "run": io.pipeline_run(stage).folder,
        "identity": identity_of(recipe, node.stage),
        "inputs": {name: digest_of(artifact.card) for name, artifact in inputs.items()},
    }
    place = HandOver(shared, job_name(stage, recipe.name, key))
    states = states or shared / STATES
    check_shared(states, settings)
    # Refused here, not by pods that take minutes to start.
    check_output_folders(stage, recipe, {n: a.path for n, a in inputs.items()}, place.out, None)
    api = JobApi(settings.namespace)
    if place.result(stage) is None:
        _say(f"Copying the inputs to {place.folder}")
        place.give(inputs)
    moved = io.moved_to({name: place.input(name) for name in inputs}, place.folder)
    command = ["vitpipe", "run", stage, *named, "--executor-input", moved, "--states", str(states)]
    job = train_job(place.folder.name, settings, command)
    run_job(api, job, settings, is_usable=lambda: place.result(stage) is not None, say=_say)
    io.finish(place.take(_finished(place, stage), out).metrics)
    place.clear()


def _finished(place: HandOver, stage: str) -> Artifact:
    """The folder that a complete job has left."""
    if (finished := place.result(stage)) is not None:
        return finished
    raise ArtifactError(
        "The job is complete, but its output is missing or damaged",
        where=place.out,
        fix="check that --shared is one claim, ReadWriteMany, at the same path in launcher and job; then "
        "run the same command again",
    )


def _check_stage(stage: str, num_gpus: int, settings: TrainJobSettings) -> None:
    """Refuse a stage that does not share its work."""
    if num_gpus < 2 and settings.num_nodes * settings.processes_per_node > 1:
        raise InputError(
            f"The stage '{stage}' runs in one process; several nodes would do the same work",
            where="STAGE",
            fix="run it by `vitpipe run`, and launch the training stages only",
        )


def _open(given: dict[str, Path], wanted: dict[str, str]) -> dict[str, Artifact]:
    """The input artifacts that the recipe's graph has; others are the job's to refuse."""
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ArtifactError(
            f"The executor input has no artifact for {', '.join(missing)}",
            where="--executor-input",
            fix="connect the task to the stages that feed it",
        )
    return {name: open_artifact(given[name], wanted[name]) for name in wanted}


def _say(line: str) -> None:
    print(line, flush=True)
