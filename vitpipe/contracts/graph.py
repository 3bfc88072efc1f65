"""THE graph: every stage's name, inputs, image, what it reads and what it needs.

`dvc.yaml`, `components/` and `pipelines/` are derived from this file or held against it by a test.
A recipe names its stages; `graph_of` connects those that are there, so a method without
intermediate fine-tuning simply has `finetune` fed by `pretrain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Image = Literal["train", "dense"]
Kind = Literal["Dataset", "Model", "Artifact", "Report"]
# Rooms of the house whose code decides a training stage's result; a change elsewhere re-runs nothing.
# That nothing a stage imports is missing here is tested.
# Of the contracts, only what a stage's work goes through: a new entry in this file re-runs nothing.
_CONTRACTS = tuple(
    f"contracts/{name}.py"
    for name in ("address", "artifact", "errors", "files", "logger", "processes", "seeds")
)
_TRAINING_CODE = (
    *_CONTRACTS,
    "config",
    "data",
    "datasets",
    "prepare",
    "models",
    "methods",
    "optim",
    "train",
    "evaluate",
    "stages/weights_identity.py",
    "stages/training.py",
)
_DENSE_CODE = (*_TRAINING_CODE, "dense", "stages/dense_training.py")


@dataclass(frozen=True)
class Resources:
    """What a stage asks of a cluster node: GPUs, CPU cores, memory and /dev/shm in GiB, retries."""

    gpus: int
    cpus: int
    memory_gib: int
    shm_gib: int
    retries: int


@dataclass(frozen=True)
class Stage:
    """One kind of node.

    Attributes:
        inputs: input name -> the stages that may feed it, best first; the first one present is taken.
        sections: top-level recipe keys that the stage reads; others do not re-run it. Only `prepare`
            reads `data`: what it makes of it reaches the others as their input folder.
        code: files and folders of `vitpipe/` that decide its result.
        module: file of `vitpipe/stages/` with its `run`, where two stages share one; its own name if empty.
    """

    name: str
    inputs: Mapping[str, tuple[str, ...]]
    sections: tuple[str, ...]
    code: tuple[str, ...]
    image: Image
    kind: Kind
    resources: Resources
    module: str = ""

    @property
    def module_name(self) -> str:
        """The module of `vitpipe.stages` with its `run`."""
        return self.module or self.name

    @property
    def all_code(self) -> tuple[str, ...]:
        """`code` and the stage's own file."""
        return (*self.code, f"stages/{self.module_name}.py")


@dataclass(frozen=True)
class Node:
    """A stage in the graph of one recipe: `inputs` maps input name -> upstream stage."""

    stage: Stage
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


_A100 = Resources(gpus=8, cpus=88, memory_gib=640, shm_gib=64, retries=5)
_ONE_GPU = Resources(gpus=1, cpus=11, memory_gib=80, shm_gib=8, retries=3)
_CPU = Resources(gpus=0, cpus=16, memory_gib=64, shm_gib=8, retries=3)
_SMALL = Resources(gpus=0, cpus=2, memory_gib=8, shm_gib=1, retries=2)
_DATA = {"data": ("prepare",)}
_RESULTS = (
    "prepare",
    "pretrain",
    "intermediate",
    "finetune",
    "probe",
    "detect",
    "segment",
    "evaluate",
)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="prepare",
        inputs={},
        sections=("data", "seed"),
        code=(*_CONTRACTS, "config", "data", "datasets", "prepare"),
        image="train",
        kind="Dataset",
        resources=_CPU,
    ),
    Stage(
        name="pretrain",
        inputs=_DATA,
        sections=("seed", "model", "pretrain"),
        code=_TRAINING_CODE,
        image="train",
        kind="Model",
        resources=_A100,
    ),
    Stage(
        name="intermediate",
        inputs={**_DATA, "weights": ("pretrain",)},
        sections=("seed", "model", "intermediate"),
        code=_TRAINING_CODE,
        image="train",
        kind="Model",
        resources=_A100,
        module="train_classifier",
    ),
    Stage(
        name="finetune",
        inputs={**_DATA, "weights": ("intermediate", "pretrain")},
        sections=("seed", "model", "finetune"),
        code=_TRAINING_CODE,
        image="train",
        kind="Model",
        resources=_A100,
        module="train_classifier",
    ),
    Stage(
        name="probe",
        inputs={**_DATA, "weights": ("pretrain", "finetune")},
        sections=("seed", "model", "probe"),
        code=_TRAINING_CODE,
        image="train",
        kind="Artifact",
        resources=_ONE_GPU,
    ),
    Stage(
        name="detect",
        inputs={**_DATA, "weights": ("pretrain", "finetune", "intermediate")},
        sections=("seed", "model", "detect"),
        code=_DENSE_CODE,
        image="dense",
        kind="Model",
        resources=_A100,
    ),
    Stage(
        name="segment",
        inputs={**_DATA, "weights": ("pretrain", "finetune", "intermediate")},
        sections=("seed", "model", "segment"),
        code=_DENSE_CODE,
        image="dense",
        kind="Model",
        resources=_A100,
    ),
    Stage(
        name="evaluate",
        inputs={**_DATA, "weights": ("finetune", "intermediate", "pretrain")},
        sections=("seed", "model", "evaluate"),
        code=(*_TRAINING_CODE, "benchmarks/model_cost.py", "benchmarks/throughput.py"),
        image="train",
        kind="Artifact",
        resources=_ONE_GPU,
    ),
    Stage(
        name="report",
        inputs={name: (name,) for name in _RESULTS},
        sections=(
            "name",
            "profile",
            "summary",
            "source",
            "expect",
            "not_comparable",
            "discrepancies",
            "report",
            "stages",
        ),
        code=(*_CONTRACTS, "contracts/graph.py", "config", "papers", "report"),
        image="train",
        kind="Report",
        resources=_SMALL,
    ),
)
BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}


def graph_of(stages: Iterable[str], start_from: Mapping[Any, str] | None = None) -> tuple[Node, ...]:
    """Connect the named stages in running order.

    An input for which no feeding stage is named is left out: `finetune` without any pre-training
    starts from random weights.

    Args:
        start_from: stage -> the stage whose weights it takes, where that is not the first one present.
    """
    present, chosen = set(stages), start_from or {}
    nodes = []
    for stage in STAGES:
        if stage.name not in present:
            continue
        inputs = {}
        for name, feeders in stage.inputs.items():
            feeder = next((f for f in feeders if f in present), None)
            if name == "weights":
                feeder = chosen.get(stage.name, feeder)
            if feeder is not None:
                inputs[name] = feeder
        nodes.append(Node(stage, inputs))
    return tuple(nodes)
