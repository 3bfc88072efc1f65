"""What one cluster looks like to a pipeline: node pools, volumes, labels, MLflow, prices.

Vendor-specific labels come from one file, never from code; `vitpipe compile --placement FILE` reads it.
k8s/placement holds one for GKE, one for EKS and one without any vendor's labels. In short:

    pools:
      gpu:
        node_selector: {cloud.google.com/gke-accelerator: nvidia-tesla-a100}
        tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
        node_type: a2-highgpu-8g
    stages: {pretrain: {gpus: 8, timeout_hours: 120}}
    claims:
      data: {name: datasets, path: /data, access_mode: ReadOnlyMany}
      state: {name: vitpipe-state, path: /state}
    tracking: {uri: "http://mlflow.mlflow:5000", experiment: vitpipe, secret: mlflow-login}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipelines.node_types import NODE_TYPES
from vitpipe.config.yaml_core import plain, read_yaml
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import Resources, all_stages
from vitpipe.contracts.spelling import did_you_mean

# Kubernetes: values of labels; names of most objects (RFC 1123); names of environment variables.
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Texts that Kubernetes or Kubeflow would replace.
_REPLACED = ("$(", "{{", "}}")
_SECRET_WORDS = re.compile(r"(?i)(password|secret|token|access_?key)")


def _label_value(text: str) -> str:
    if not _LABEL_VALUE.fullmatch(text):
        raise ValueError(f"'{text}' is no value of a label: at most 63 letters, digits, '-', '_' and '.'")
    return text


def _object_name(text: str) -> str:
    if not _OBJECT.fullmatch(text):
        raise ValueError(f"'{text}' is no name of a Kubernetes object: lower case, digits, '-' and '.'")
    return text


def _label_key(text: str) -> str:
    if not _LABEL_KEY.fullmatch(text):
        raise ValueError(f"'{text}' is no key of a label")
    return text


def _place(text: str) -> str:
    if not text.startswith("/") or text == "/" or ".." in text.split("/"):
        raise ValueError(f"'{text}' is no absolute path of a folder")
    return text


LabelValue = Annotated[str, AfterValidator(_label_value)]
LabelKey = Annotated[str, AfterValidator(_label_key)]
ObjectName = Annotated[str, AfterValidator(_object_name)]
MountPath = Annotated[str, AfterValidator(_place)]
AccessMode = Literal["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Toleration(_Part):
    """A node taint that the tasks of a pool tolerate; fields as in Kubernetes."""

    key: LabelKey
    operator: Literal["Exists", "Equal"] = "Exists"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pool(_Part):
    """Nodes of one kind.

    Attributes:
        node_selector: labels that the nodes have.
        tolerations: taints of the nodes, those of spot nodes among them.
        node_type: the cloud's name of the machine, one of `NODE_TYPES`; what never fits it is refused.
        price_per_hour: of one node, in any currency; for the estimate that `vitpipe compile` prints.
    """

    node_selector: dict[LabelKey, LabelValue] = {}
    tolerations: tuple[Toleration, ...] = ()
    node_type: str = ""
    price_per_hour: float | None = Field(default=None, gt=0.0)


class StagePlace(_Part):
    """What differs for one stage; None keeps the graph's value.

    Attributes:
        nodes: more than one makes the task a launcher of a Kubeflow TrainJob; `gpus`, `cpus` and memory are
            those of each node.
        pool: a pool of the placement; by default `gpu` for a stage with GPUs, else `cpu`.
        timeout_hours: of one try; by default derived from the planned steps.
    """

    gpus: int | None = Field(default=None, ge=0)
    nodes: int = Field(default=1, ge=1)
    cpus: float | None = Field(default=None, gt=0.0)
    memory_gib: float | None = Field(default=None, gt=0.0)
    shm_gib: float | None = Field(default=None, gt=0.0)
    retries: int | None = Field(default=None, ge=0)
    pool: str | None = None
    timeout_hours: float | None = Field(default=None, gt=0.0)


class Claim(_Part):
    """A PersistentVolumeClaim and where it is mounted.

    Attributes:
        access_mode: of the claim; `ReadOnlyMany` is right for raw data, which no task may change.
    """

    name: ObjectName
    path: MountPath
    access_mode: AccessMode = "ReadWriteMany"


class Claims(_Part):
    """`data`: the raw datasets. `state`: saved training states and records for MLflow; survives pods."""

    data: Claim | None = None
    state: Claim | None = None


class Scratch(_Part):
    """A volume at /tmp that lives as long as the pod, for what loaders and torch write there."""

    size_gib: int = Field(ge=1)
    storage_class: ObjectName | None = None


class Tracking(_Part):
    """MLflow as the pods reach it.

    Attributes:
        secret: a Secret of the pipeline's namespace with the keys `username` and `password`, or `token`.
        secret_kind: which of them it has.
    """

    uri: str
    experiment: str | None = None
    secret: ObjectName | None = None
    secret_kind: Literal["basic", "token"] = "basic"

    @property
    def login(self) -> dict[str, str]:
        """Key of the secret -> the variable by which MLflow's client reads it."""
        if self.secret_kind == "token":
            return {"token": "MLFLOW_TRACKING_TOKEN"}
        return {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}


class TrainJobs(_Part):
    """For stages on several nodes: the ClusterTrainingRuntime that their TrainJobs name."""

    runtime: ObjectName = "vitpipe-torch"


class Placement(_Part):
    """One cluster.

    Attributes:
        gpu_resource: Kubernetes resource name of a GPU.
        pools: `gpu` and `cpu`, and others that `stages` name.
        stages: stage -> what differs for it.
        labels: of every pod, for example team and cost-center; recipe, profile and stage are added.
        queue: the LocalQueue of Kueue that admits the pods.
        annotations: of every pod.
        pull_secrets, pull_policy: of the images.
        environment: of every container, for example NCCL_DEBUG; no secrets.
        service_account: of the run's pods; `vitpipe submit --placement` asks for it.
        pages: address of Kubeflow's pages, to which MLflow's runs then link.
        queueing_hours: how long a try may wait for a node; part of the window in which a task is retried.
        user: uid and gid that the containers run as; None leaves it to the image.
    """

    # kfp calls this the accelerator type and writes it verbatim into the pod's limits. The name of a GPU
    # model here ("nvidia-tesla-a100") gives a pod that no node can run; the model is chosen by node_selector.
    gpu_resource: LabelKey = "nvidia.com/gpu"
    pools: dict[str, Pool] = {}
    stages: dict[str, StagePlace] = {}
    claims: Claims = Claims()
    scratch: Scratch | None = None
    tracking: Tracking | None = None
    train_jobs: TrainJobs = TrainJobs()
    labels: dict[LabelKey, LabelValue] = {}
    queue: LabelValue | None = None
    annotations: dict[LabelKey, str] = {}
    pull_secrets: tuple[ObjectName, ...] = ()
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    environment: dict[str, str] = {}
    service_account: ObjectName | None = None
    pages: str | None = None
    queueing_hours: float = Field(default=24.0, ge=0.0)
    # Not root (ge=1): runAsNonRoot is asked for, and Kubernetes then refuses to start uid 0.
    user: int | None = Field(default=1000, ge=1)

    def pool_of(self, stage: str, resources: Resources) -> Pool:
        """The nodes that a stage runs on; without a pool of that name any node."""
        named = self.stage(stage).pool or ("gpu" if resources.gpus else "cpu")
        return self.pools.get(named, Pool())

    def stage(self, name: str) -> StagePlace:
        """What differs for a stage."""
        return self.stages.get(name, StagePlace())


def read_placement(path: Path) -> Placement:
    """Read a placement file.

    Raises:
        InputError: when the file is missing, not YAML, or has unknown keys or wrong values; all are named.
    """
    try:
        placement = Placement.model_validate(plain(read_yaml(read_text(path))) or {})
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not YAML"
        raise InputError(
            f"The placement file cannot be read ({reason})", where=path, fix="give a readable YAML file"
        ) from error
    except ValidationError as error:
        wrong = "; ".join(_wrong_value(tuple(item["loc"]), item["msg"]) for item in error.errors())
        known = ", ".join(Placement.model_fields)
        raise InputError(
            f"The placement file is invalid: {wrong}", where=path, fix=f"correct it; the keys are {known}"
        ) from error
    if found := list(_contradictions(placement)):
        raise InputError(
            f"The placement file is invalid: {'; '.join(found)}", where=path, fix="correct these values"
        )
    return placement


def _wrong_value(place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, place))
    moved = {"node_selector": "pools.gpu", "tolerations": "pools.gpu", "data_claim": "claims.data"}
    hint = f" (it is in {moved[key]} now)" if key in moved else did_you_mean(key, Placement.model_fields)
    return f"'{key}': {message}" + (hint if message.startswith("Extra inputs") else "")


def _contradictions(placement: Placement) -> list[str]:
    """What each value allows by itself and all of them together do not."""
    found = []
    for stage, chosen in placement.stages.items():
        if stage not in all_stages():
            found.append(f"'stages.{stage}' is no stage{did_you_mean(stage, all_stages())}")
        if chosen.pool is not None and chosen.pool not in placement.pools:
            found.append(f"'stages.{stage}.pool' names '{chosen.pool}', which is not in 'pools'")
        if chosen.nodes > 1 and placement.claims.state is None:
            found.append(f"'stages.{stage}.nodes' needs 'claims.state', a volume that all nodes share")
    for name, pool in placement.pools.items():
        if pool.node_type and pool.node_type not in NODE_TYPES:
            hint = did_you_mean(pool.node_type, NODE_TYPES) or f"; known are {', '.join(NODE_TYPES)}"
            found.append(f"'pools.{name}.node_type' is unknown: {pool.node_type}{hint}")
    state = placement.claims.state
    if state is not None and state.access_mode == "ReadOnlyMany":
        found.append("'claims.state' is ReadOnlyMany, but states are written into it")
    paths = [claim.path for claim in (placement.claims.data, state) if claim is not None]
    if len(set(paths)) < len(paths):
        found.append(f"both claims are mounted at {paths[0]}")
    found += [f"the claim at {path} would hide what pods need there" for path in paths if _is_taken(path)]
    for name, value in placement.environment.items():
        if not _VARIABLE.fullmatch(name):
            found.append(f"'environment' has '{name}', which is no name of a variable")
        # A package is stored and shown in plain text.
        if _SECRET_WORDS.search(name) or hidden(value) != value:
            found.append(f"'environment.{name}' looks like a secret; put it into a Secret of the cluster")
    if placement.pages is not None and hidden(placement.pages) != placement.pages:
        found.append("'pages' contains credentials, which MLflow would show")
    if placement.tracking is not None and hidden(placement.tracking.uri) != placement.tracking.uri:
        found.append(
            "'tracking.uri' contains credentials; put them into a Secret and name it as its 'secret'"
        )
    texts = [*placement.environment.values(), *placement.annotations.values()]
    texts += [placement.tracking.uri] if placement.tracking is not None else []
    texts += [placement.pages] if placement.pages is not None else []
    found += [f"'{text}' contains {part}" for text in texts for part in _REPLACED if part in text]
    return found


def _is_taken(path: str) -> bool:
    taken = ("/tmp", "/dev", "/proc", "/sys", "/etc", "/usr", "/bin", "/lib", "/gcs", "/s3", "/minio", "/kfp")
    return any(path == place or path.startswith(f"{place}/") for place in taken)
