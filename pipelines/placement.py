"""Where a task runs and with which resources: requests, GPUs, node labels, /dev/shm, time limit, retries.

Vendor-specific labels come from one profile file, never from code. Example for A100 nodes of GKE:

    node_selector: {cloud.google.com/gke-accelerator: nvidia-tesla-a100}
    tolerations:
      - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
    data_claim: datasets
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpipe.config.recipe import Recipe
from vitpipe.config.yaml_core import plain, read_yaml
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import Resources, Stage

if TYPE_CHECKING:
    from kfp import dsl

# Detection at demo size needs 963 MiB with Docker's default /dev/shm of 64 MiB (measured in a container).
_DEMO = Resources(gpus=0, cpus=2, memory_gib=8, shm_gib=1, retries=1)
# Pauses of 60 s, 120 s, 240 s, ...
_BACKOFF, _BACKOFF_FACTOR = "60s", 2.0
# kfp's `backoff_max_duration` is not the longest pause: it is the whole window, counted from the first start
# of the task, in which a failure is retried. A failure later than this is final.
_RETRY_WINDOW = "900s"


class Toleration(BaseModel):
    """A node taint that GPU tasks tolerate; fields as in Kubernetes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Placement(BaseModel):
    """One cluster's labels and volumes.

    Attributes:
        gpu_resource: Kubernetes resource name of a GPU.
        node_selector: node labels that GPU tasks require.
        tolerations: taints that GPU tasks tolerate.
        timeout_hours: a task is stopped after this time.
        data_claim: PersistentVolumeClaim with the raw datasets, mounted at `data_path` into every task.
        user: uid and gid that the containers run as; None leaves it to the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # kfp calls this the accelerator type and writes it verbatim into the pod's limits. The name of a GPU
    # model here ("nvidia-tesla-a100") gives a pod that no node can run; the model is chosen by node_selector.
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    timeout_hours: float = Field(default=72.0, gt=0.0)
    data_claim: str = ""
    data_path: str = "/data"
    # Not root (ge=1): `place` asks for runAsNonRoot, and Kubernetes then refuses to start uid 0.
    user: int | None = Field(default=1000, ge=1)


def read_placement(path: Path) -> Placement:
    """Read a placement profile.

    Raises:
        InputError: when the file is missing, not YAML, or has unknown keys or wrong values.
    """
    try:
        return Placement.model_validate(plain(read_yaml(read_text(path))) or {})
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not YAML"
        raise InputError(
            f"The placement profile cannot be read ({reason})", where=path, fix="give a readable YAML file"
        ) from error
    except ValidationError as error:
        wrong = "; ".join(f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors())
        known = ", ".join(Placement.model_fields)
        raise InputError(
            f"The placement profile is invalid: {wrong}", where=path, fix=f"correct it; the keys are {known}"
        ) from error


def resources_of(stage: Stage, recipe: Recipe) -> Resources:
    """The graph's resources for real data; two cores without a GPU for the embedded data."""
    return _DEMO if recipe.data.source == "embedded" else stage.resources


def place(task: dsl.PipelineTask, resources: Resources, placement: Placement) -> None:
    """Set requests, limits, volumes, time limit and retries of a task."""
    from kfp import kubernetes

    # No CPU limit: the kernel would throttle the task at it even when other cores of the node are idle.
    task.set_cpu_request(str(resources.cpus))
    task.set_memory_request(f"{resources.memory_gib}Gi").set_memory_limit(f"{resources.memory_gib}Gi")
    task.set_retry(resources.retries, _BACKOFF, _BACKOFF_FACTOR, _RETRY_WINDOW)
    kubernetes.set_timeout(task, round(placement.timeout_hours * 3600))
    # Pods have 64 MB of /dev/shm, with which loader processes die of a bus error. A memory-backed volume
    # there replaces it; what it holds counts against the memory limit.
    kubernetes.empty_dir_mount(
        task,
        volume_name="shared-memory",
        mount_path="/dev/shm",
        medium="Memory",
        size_limit=f"{resources.shm_gib}Gi",
    )
    if placement.user is not None:
        kubernetes.set_security_context(
            task, run_as_user=placement.user, run_as_group=placement.user, run_as_non_root=True
        )
    if placement.data_claim:
        # Datasets are mounted, never artifacts: KFP copies every input artifact into the pod. kfp-kubernetes
        # 2.17 has no readOnly switch for mounts.
        kubernetes.mount_pvc(task, placement.data_claim, placement.data_path)
    # The labels are those of GPU nodes: with them, a CPU task would wait for a GPU node.
    if resources.gpus == 0:
        return
    task.set_accelerator_type(placement.gpu_resource).set_accelerator_limit(resources.gpus)
    for label, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in placement.tolerations:
        # exclude_none: Kubernetes refuses `Exists` with a value, and reads an absent effect as "all effects".
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
