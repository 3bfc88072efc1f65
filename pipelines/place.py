"""Put a task on a cluster: resources, nodes, volumes, environment, labels, time limit and retries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.node_types import NODE_TYPES
from pipelines.placement import Placement, Pool
from pipelines.time_limits import (
    BACKOFF_FACTOR,
    BACKOFF_SECONDS,
    expected_hours,
    limit_hours,
    retry_window_seconds,
)
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import Resources, Stage, graph_of
from vitpipe.stages.pipeline_run import IMAGE_VARIABLE, PAGES_VARIABLE, POD_VARIABLE
from vitpipe.stages.state_folder import STATES_VARIABLE

if TYPE_CHECKING:
    from kfp import dsl

# Detection at demo size needs 963 MiB with Docker's default /dev/shm of 64 MiB (measured in a container).
_DEMO = Resources(gpus=0, cpus=2, memory_gib=8, shm_gib=1, retries=1)
# What makes a job and follows it; an hour for the copies of inputs and output.
_LAUNCHER = Resources(gpus=0, cpus=1, memory_gib=4, shm_gib=1, retries=0)
_LAUNCHER_SECONDS = 3600
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# Where the images of docker/ have a writable place with a read-only root.
_SCRATCH = "/tmp"


def resources_of(stage: Stage, recipe: Recipe, placement: Placement) -> Resources:
    """The graph's resources for real data, two cores for the embedded data, with the placement's changes."""
    known = _DEMO if recipe.data.source == "embedded" else stage.resources
    chosen = placement.stage(stage.name)
    given = {name: getattr(chosen, name) for name in ("gpus", "cpus", "memory_gib", "shm_gib", "retries")}
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def check_fits(stages: Iterator[tuple[Stage, Recipe]], placement: Placement) -> None:
    """Refuse tasks that no node of their pool can ever run.

    Raises:
        InputError: names all of them with what is too much.
    """
    found = []
    for stage, recipe in stages:
        resources = resources_of(stage, recipe, placement)
        pool = placement.pool_of(stage.name, resources)
        if pool.node_type and (why := NODE_TYPES[pool.node_type].misfit(resources)):
            found.append(f"{stage.name} asks for {why} that pods get on {pool.node_type}")
    if found:
        raise InputError(
            f"No node can run these tasks: {'; '.join(dict.fromkeys(found))}",
            where="--placement",
            fix="give the stage less under 'stages', for example {gpus: 1, cpus: 10, memory_gib: 64}, or "
            "its pool another node_type",
        )


def shown_tasks(recipe: Recipe, placement: Placement) -> list[dict[str, str]]:
    """One row per task for the terminal: nodes and GPUs, expected GPU-hours, time limit, price."""
    rows = []
    for node in graph_of(recipe.stages, recipe.start_from):
        resources, chosen = resources_of(node.stage, recipe, placement), placement.stage(node.name)
        hours = expected_hours(node.stage, recipe, resources, chosen.nodes)
        price = placement.pool_of(node.name, resources).price_per_hour
        limit = timeout_seconds_of(node.stage, recipe, placement) / 3600
        rows.append(
            {
                "task": node.name,
                "nodes": str(chosen.nodes),
                "GPUs": str(resources.gpus * chosen.nodes),
                "GPU-hours": f"about {hours * resources.gpus * chosen.nodes:,.0f}" if hours else "",
                "limit": f"{limit:,.0f} h",
                "price": f"about {hours * price * chosen.nodes:,.0f}" if hours and price else "",
            }
        )
    return rows


def timeout_seconds_of(stage: Stage, recipe: Recipe, placement: Placement) -> int:
    """Seconds after which one try is ended: the placement's, else by the planned steps."""
    chosen = placement.stage(stage.name)
    if chosen.timeout_hours is not None:
        return round(chosen.timeout_hours * 3600)
    resources = resources_of(stage, recipe, placement)
    return limit_hours(stage, recipe, resources, chosen.nodes) * 3600


def place(task: dsl.PipelineTask, stage: Stage, recipe: Recipe, placement: Placement, image: str) -> None:
    """Set everything that a task needs besides its inputs.

    Args:
        image: reference of the task's image.
    """
    from kfp import kubernetes

    resources, timeout = resources_of(stage, recipe, placement), timeout_seconds_of(stage, recipe, placement)
    if placement.stage(stage.name).nodes > 1:
        # The task only follows a job, which has these resources; it waits for its nodes, too.
        resources = replace(_LAUNCHER, retries=resources.retries)
        timeout += round(placement.queueing_hours * 3600) + _LAUNCHER_SECONDS
        pool = placement.pools.get("cpu", Pool())
    else:
        pool = placement.pool_of(stage.name, resources)
    task.set_container_image(image)
    # No CPU limit: the kernel would throttle the task at it even when other cores of the node are idle.
    task.set_cpu_request(f"{resources.cpus:g}")
    task.set_memory_request(f"{resources.memory_gib:g}Gi").set_memory_limit(f"{resources.memory_gib:g}Gi")
    kubernetes.set_timeout(task, timeout)
    window = retry_window_seconds(timeout, resources.retries, placement.queueing_hours)
    task.set_retry(resources.retries, f"{BACKOFF_SECONDS}s", BACKOFF_FACTOR, f"{window}s")
    if resources.gpus:
        task.set_accelerator_type(placement.gpu_resource).set_accelerator_limit(resources.gpus)
    _place_pod(task, pool, placement)
    _mount(task, resources, placement)
    _set_environment(task, image, placement)
    for key, value in {**placement.labels, **own_labels(stage, recipe, placement)}.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in placement.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)


def _place_pod(task: dsl.PipelineTask, pool: Pool, placement: Placement) -> None:
    from kfp import kubernetes

    for label, value in pool.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in pool.tolerations:
        # exclude_none: Kubernetes refuses `Exists` with a value, and reads an absent effect as "all effects".
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
    if placement.user is not None:
        kubernetes.set_security_context(
            task, run_as_user=placement.user, run_as_group=placement.user, run_as_non_root=True
        )
    if placement.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(placement.pull_secrets))
    if placement.pull_policy is not None:
        kubernetes.set_image_pull_policy(task, placement.pull_policy)


def _mount(task: dsl.PipelineTask, resources: Resources, placement: Placement) -> None:
    from kfp import kubernetes

    # Pods have 64 MB of /dev/shm, with which loader processes die of a bus error. A memory-backed volume
    # there replaces it; what it holds counts against the memory limit.
    kubernetes.empty_dir_mount(
        task,
        volume_name="shared-memory",
        mount_path="/dev/shm",
        medium="Memory",
        size_limit=f"{resources.shm_gib:g}Gi",
    )
    # Datasets are mounted, never artifacts: KFP copies every input artifact into the pod. kfp-kubernetes 2.17
    # has no readOnly switch for mounts, so the claim's access mode protects them.
    for claim in (placement.claims.data, placement.claims.state):
        if claim is not None:
            kubernetes.mount_pvc(task, claim.name, claim.path)
    if placement.scratch is not None:
        kubernetes.add_ephemeral_volume(
            task,
            volume_name="scratch",
            mount_path=_SCRATCH,
            access_modes=["ReadWriteOnce"],
            size=f"{placement.scratch.size_gib}Gi",
            storage_class_name=placement.scratch.storage_class,
        )


def _set_environment(task: dsl.PipelineTask, image: str, placement: Placement) -> None:
    from kfp import kubernetes

    for name, value in _environment(image, placement):
        task.set_env_variable(name, value)
    # The name of the pod, for tags in MLflow and locks. Not a value: it would spoil Kubeflow's cache.
    kubernetes.use_field_path_as_env(task, POD_VARIABLE, "metadata.name")
    tracking = placement.tracking
    if tracking is not None and tracking.secret is not None:
        kubernetes.use_secret_as_env(task, tracking.secret, tracking.login)


def _environment(image: str, placement: Placement) -> Iterator[tuple[str, str]]:
    """Variables of the container; all are part of Kubeflow's cache key, so none may change by itself."""
    yield IMAGE_VARIABLE, image
    if placement.pages is not None:
        yield PAGES_VARIABLE, placement.pages
    if placement.claims.state is not None:
        yield STATES_VARIABLE, placement.claims.state.path
    if placement.tracking is not None:
        yield "MLFLOW_TRACKING_URI", placement.tracking.uri
        if placement.tracking.experiment is not None:
            yield "MLFLOW_EXPERIMENT_NAME", placement.tracking.experiment
    yield from placement.environment.items()


def own_labels(stage: Stage, recipe: Recipe, placement: Placement) -> dict[str, str]:
    """Labels by which costs are summed, and the queue."""
    name = "".join(c if c.isalnum() or c in "-_." else "." for c in recipe.name)[:63].strip("-_.")
    labels = {
        "vitpipe/recipe": name,
        "vitpipe/profile": recipe.profile[:63],
        "vitpipe/stage": stage.name[:63],
    }
    return labels if placement.queue is None else {**labels, QUEUE_LABEL: placement.queue}
