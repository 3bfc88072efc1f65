"""What a job on several nodes needs beside its command: one JSON text, so that it can be one argument.

The command line of a launcher, as `launch_arguments` makes it for a pipeline:

    vitpipe launch pretrain --recipe itpn/pixel_base --profile full --executor-input '{{$}}'
        --job '{"image": "...@sha256:...", "num_nodes": 2, "gpus_per_node": 8, "cpu": "88", "memory": "640Gi",
                "shm": "64Gi", "claims": [{"claim": "runs", "path": "/runs"}]}'
        --shared /runs
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitpipe.contracts.errors import InputError, shortened
from vitpipe.contracts.spelling import did_you_mean
from vitpipe.stages.pipeline_run import IMAGE_VARIABLE, POD_VARIABLE

# Set by Trainer's torch plugin, which refuses a job that brings its own, and by `train_job`.
RESERVED_VARIABLES = ("PET_", IMAGE_VARIABLE, POD_VARIABLE)
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"

Quantity = Annotated[str, Field(pattern=_QUANTITY)]
OptionalQuantity = Annotated[str, Field(pattern=rf"^$|{_QUANTITY}")]
Name = Annotated[str, Field(pattern=_NAME, max_length=253)]
OptionalName = Annotated[str, Field(pattern=rf"^$|{_NAME}", max_length=253)]
LabelValue = Annotated[str, Field(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("no name of a variable")
    if name.startswith(RESERVED_VARIABLES):
        raise ValueError("is set by the job itself")
    return name


def _absolute(path: str) -> str:
    place = PurePosixPath(path)
    if not place.is_absolute() or str(place) == "/" or ".." in place.parts:
        raise ValueError("an absolute path below / is expected")
    return str(place)


Variable = Annotated[str, AfterValidator(_variable)]
MountPath = Annotated[str, AfterValidator(_absolute)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobToleration(_Part):
    """A node taint that the job's pods tolerate; fields as in Kubernetes."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class SecretVariable(_Part):
    """A variable whose value is a key of a Secret in the job's namespace."""

    variable: Variable
    secret: Name
    key: str
    optional: bool = False


class ClaimMount(_Part):
    """A PersistentVolumeClaim and where the pods see it."""

    claim: Name
    path: MountPath
    read_only: bool = False
    sub_path: str = ""


class TrainJobSettings(_Part):
    """A job on several nodes: size, place and surroundings. The stage and its recipe are not part of it.

    Attributes:
        image: of the stage; by digest, so that a retry runs the same code.
        cpu, memory: of one node's pod; memory is a limit, too.
        shm: size of the memory-backed /dev/shm, which counts against the memory; empty leaves 64 MiB.
        resources: others of one pod, for example `{"vpc.amazonaws.com/efa": "4"}`.
        runtime: name of the Trainer runtime with the torch policy.
        namespace: empty for the one that the launcher runs in.
        queue: Kueue's LocalQueue; empty for none.
        claims: one of them, writable, holds the launcher's `--shared` folder at the same path.
        user: uid and gid of the pods; None leaves it to the image.
        grace_seconds: between SIGTERM and the kill of a pod, to save a training state.
        restarts: how often all ranks start again inside their pods after one has died.
        active_deadline_seconds: Trainer ends the job after this time at work; waiting does not count.
        time_limit_seconds: the launcher deletes the job after this time, waiting included.
        unreachable_seconds: how long the launcher goes on without an answer of the Kubernetes API. The job
            runs on; the next launcher adopts it.
    """

    image: Annotated[str, Field(min_length=1, max_length=500)]
    num_nodes: int = Field(ge=1, le=1000)
    gpus_per_node: int = Field(ge=0, le=16)
    cpu: Quantity
    memory: Quantity
    shm: OptionalQuantity = ""
    gpu_resource: str = "nvidia.com/gpu"
    resources: dict[str, Quantity] = {}
    runtime: Name = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    namespace: OptionalName = ""
    queue: LabelValue = ""
    labels: dict[str, LabelValue] = {}
    annotations: dict[str, str] = {}
    node_selector: dict[str, LabelValue] = {}
    tolerations: tuple[JobToleration, ...] = ()
    environment: dict[Variable, str] = {}
    secrets: tuple[SecretVariable, ...] = ()
    claims: tuple[ClaimMount, ...] = Field(min_length=1)
    pull_secrets: tuple[Name, ...] = ()
    service_account: OptionalName = ""
    # Not root (ge=1): the pods ask for runAsNonRoot, and Kubernetes then refuses to start uid 0.
    user: int | None = Field(default=1000, ge=1)
    grace_seconds: int = Field(default=120, ge=1)
    restarts: int = Field(default=3, ge=0)
    active_deadline_seconds: int | None = Field(default=None, ge=1)
    time_limit_seconds: int | None = Field(default=None, ge=1)
    unreachable_seconds: int = Field(default=900, ge=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        paths = [mount.path for mount in self.claims]
        if len(set(paths)) != len(paths):
            raise ValueError("two claims have the same path")
        variables = [*self.environment, *(secret.variable for secret in self.secrets)]
        if len(set(variables)) != len(variables):
            raise ValueError("a variable is given twice, in 'environment' and 'secrets'")
        return self

    @property
    def processes_per_node(self) -> int:
        """Ranks on one node: one per GPU, one without."""
        return max(1, self.gpus_per_node)


def read_settings(text: str) -> TrainJobSettings:
    """The settings from their JSON text.

    Raises:
        InputError: it is not JSON, or a key is unknown, missing or has a wrong value; all mistakes at once.
    """
    try:
        return TrainJobSettings.model_validate_json(text)
    except ValidationError as error:
        mistakes = "; ".join(_mistake(item) for item in error.errors())
        raise InputError(
            f"The job's settings cannot be used: {mistakes}",
            where="--job",
            fix=f"give JSON with the keys {', '.join(TrainJobSettings.model_fields)}",
        ) from error


def _mistake(item: object) -> str:
    found = dict(item)  # type: ignore[call-overload]
    path = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        return f"'{path}' is not a known key{did_you_mean(found['loc'][-1], TrainJobSettings.model_fields)}"
    if found["type"] == "missing":
        return f"'{path}' is missing"
    if found["type"] == "json_invalid":
        return f"it is not JSON ({found['msg'].removeprefix('Invalid JSON: ')})"
    message = found["msg"].removeprefix("Value error, ")
    given = "" if not path else f" (given: {shortened(repr(found['input']))})"
    return f"'{path}': {message}{given}" if path else message


def settings_text(settings: TrainJobSettings) -> str:
    """The settings as one JSON text for `--job`: the keys that differ from the default, in a fixed order."""
    values = settings.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def launch_arguments(
    stage: str,
    recipe: str,
    profile: str,
    settings: TrainJobSettings,
    shared: Path,
    executor_input: str,
    more: Sequence[str] = (),
) -> list[str]:
    """The command of a component that runs a stage on several nodes, see the module's docstring.

    Args:
        recipe, profile: names, or Kubeflow's placeholders of them.
        shared: a folder on a writable claim of the job, at the same path in the launcher's pod.
        executor_input: Kubeflow's placeholder `{{$}}`.
        more: further arguments, for example `--states DIR`.
    """
    return [
        *("vitpipe", "launch", stage, "--recipe", recipe, "--profile", profile),
        *("--executor-input", executor_input, "--job", settings_text(settings)),
        *("--shared", str(shared), *more),
    ]
