"""Stages on more than one node: the settings of the job that their task launches.

Inside one pod torchrun starts a process per GPU. Beyond, the task is a small pod that makes a Kubeflow
TrainJob and follows it (vitpipe/cluster); resources, nodes, volumes and variables of the placement are then
those of the job's pods.
"""

from __future__ import annotations

from pipelines.place import QUEUE_LABEL, own_labels, resources_of, timeout_seconds_of
from pipelines.placement import Placement
from vitpipe.cluster.settings import (
    ClaimMount,
    JobToleration,
    SecretVariable,
    TrainJobSettings,
    settings_text,
)
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Stage
from vitpipe.stages.pipeline_run import PAGES_VARIABLE

# Inputs and outputs of a job lie here on the claim of the states, which all its pods see.
_SHARED = "shared"


def job_arguments(stage: Stage, recipe: Recipe, placement: Placement, image: str) -> tuple[str, ...]:
    """Arguments of `vitpipe launch` for a stage on several nodes; empty for one on a single node."""
    state = placement.claims.state
    # `read_placement` refuses several nodes without this claim.
    if placement.stage(stage.name).nodes < 2 or state is None:
        return ()
    settings = job_settings(stage, recipe, placement, image)
    return ("--job", settings_text(settings), "--shared", f"{state.path}/{_SHARED}")


def job_settings(stage: Stage, recipe: Recipe, placement: Placement, image: str) -> TrainJobSettings:
    """The job of a stage."""
    resources = resources_of(stage, recipe, placement)
    pool, tracking = placement.pool_of(stage.name, resources), placement.tracking
    limit = timeout_seconds_of(stage, recipe, placement)
    labels = {**placement.labels, **own_labels(stage, recipe, placement)}
    labels.pop(QUEUE_LABEL, None)  # the job itself is queued, not its pods one by one
    return TrainJobSettings(
        image=image,
        num_nodes=placement.stage(stage.name).nodes,
        gpus_per_node=resources.gpus,
        cpu=f"{resources.cpus:g}",
        memory=f"{resources.memory_gib:g}Gi",
        shm=f"{resources.shm_gib:g}Gi",
        gpu_resource=placement.gpu_resource,
        runtime=placement.train_jobs.runtime,
        queue=placement.queue or "",
        labels=labels,
        annotations=dict(placement.annotations),
        node_selector=dict(pool.node_selector),
        tolerations=tuple(JobToleration(**item.model_dump()) for item in pool.tolerations),
        environment=_environment(placement),
        secrets=tuple(
            SecretVariable(variable=variable, secret=tracking.secret, key=key)
            for key, variable in tracking.login.items()
        )
        if tracking is not None and tracking.secret is not None
        else (),
        claims=tuple(
            ClaimMount(claim=claim.name, path=claim.path, read_only=claim.access_mode == "ReadOnlyMany")
            for claim in (placement.claims.data, placement.claims.state)
            if claim is not None
        ),
        pull_secrets=placement.pull_secrets,
        user=placement.user,
        restarts=resources.retries,
        active_deadline_seconds=limit,
        time_limit_seconds=limit + round(placement.queueing_hours * 3600),
    )


def _environment(placement: Placement) -> dict[str, str]:
    variables = dict(placement.environment)
    if placement.pages is not None:
        variables[PAGES_VARIABLE] = placement.pages
    if placement.tracking is not None:
        variables["MLFLOW_TRACKING_URI"] = placement.tracking.uri
        if placement.tracking.experiment is not None:
            variables["MLFLOW_EXPERIMENT_NAME"] = placement.tracking.experiment
    return variables
