"""Where a task runs and with what: requests, GPUs, node labels, shared memory, time limit, retries.

Vendor labels come from one profile file and never from code; without a profile there are none. Example:

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
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import Resources, Stage

if TYPE_CHECKING:
    from kfp import dsl

_DEMO = Resources(gpus=0, cpus=2, memory_gib=8, shm_gib=1, retries=1)
_BACKOFF, _BACKOFF_FACTOR, _LONGEST_BACKOFF = "60s", 2.0, "900s"


class Toleration(BaseModel):
    """A node taint that GPU tasks accept; fields as in Kubernetes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Placement(BaseModel):
    """One cluster's labels and volumes.

    Attributes:
        gpu_resource: the resource name of a GPU, which is what Kubeflow calls the accelerator type.
        node_selector: labels of the nodes that GPU tasks need.
        tolerations: taints that GPU tasks accept.
        timeout_hours: a task is stopped after this long.
        data_claim: volume claim with the raw datasets, mounted at `data_path` into every task.
        user: uid and gid that the containers run as.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    timeout_hours: float = Field(default=72.0, gt=0.0)
    data_claim: str = ""
    data_path: str = "/data"
    user: int | None = Field(default=1000, ge=1)


def read_placement(path: Path) -> Placement:
    """Read a placement profile.

    Raises:
        InputError: when the file is missing, not YAML, or has unknown keys or wrong values.
    """
    try:
        return Placement.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not YAML"
        raise InputError(
            f"The placement profile cannot be read ({reason})", where=path, fix="check the path"
        ) from error
    except ValidationError as error:
        wrong = "; ".join(f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors())
        known = ", ".join(Placement.model_fields)
        raise InputError(
            f"The placement profile is wrong: {wrong}", where=path, fix=f"known keys are {known}"
        ) from error


def resources_of(stage: Stage, recipe: Recipe) -> Resources:
    """What the graph says for real data; two cores without a GPU for the embedded data."""
    return _DEMO if recipe.data.source == "embedded" else stage.resources


def place(task: dsl.PipelineTask, resources: Resources, placement: Placement) -> None:
    """Put requests, limits, volumes, time limit and retries on a task.

    Shared memory is a memory-backed volume, because pods have 64 MB of it and data workers die of that with
    a bus error; it counts against the memory limit.
    """
    from kfp import kubernetes

    task.set_cpu_request(str(resources.cpus))
    task.set_memory_request(f"{resources.memory_gib}Gi").set_memory_limit(f"{resources.memory_gib}Gi")
    task.set_retry(resources.retries, _BACKOFF, _BACKOFF_FACTOR, _LONGEST_BACKOFF)
    kubernetes.set_timeout(task, round(placement.timeout_hours * 3600))
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
        kubernetes.mount_pvc(task, placement.data_claim, placement.data_path)
    if resources.gpus == 0:
        return
    task.set_accelerator_type(placement.gpu_resource).set_accelerator_limit(resources.gpus)
    for label, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in placement.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
