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
    """

    name: str
    inputs: Mapping[str, tuple[str, ...]]
    sections: tuple[str, ...]
    code: tuple[str, ...]
    image: Image
    kind: Kind
    resources: Resources


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
        "prepare",
        {},
        ("data", "seed"),
        (*_CONTRACTS, "config", "data", "datasets", "prepare"),
        "train",
        "Dataset",
        _CPU,
    ),
    Stage(
        "pretrain",
        _DATA,
        ("seed", "model", "pretrain"),
        _TRAINING_CODE,
        "train",
        "Model",
        _A100,
    ),
    Stage(
        "intermediate",
        {**_DATA, "weights": ("pretrain",)},
        ("seed", "model", "intermediate"),
        _TRAINING_CODE,
        "train",
        "Model",
        _A100,
    ),
    Stage(
        "finetune",
        {**_DATA, "weights": ("intermediate", "pretrain")},
        ("seed", "model", "finetune"),
        _TRAINING_CODE,
        "train",
        "Model",
        _A100,
    ),
    Stage(
        "probe",
        {**_DATA, "weights": ("pretrain", "finetune")},
        ("seed", "model", "probe"),
        _TRAINING_CODE,
        "train",
        "Artifact",
        _ONE_GPU,
    ),
    Stage(
        "detect",
        {**_DATA, "weights": ("pretrain", "finetune", "intermediate")},
        ("seed", "model", "detect"),
        _DENSE_CODE,
        "dense",
        "Model",
        _A100,
    ),
    Stage(
        "segment",
        {**_DATA, "weights": ("pretrain", "finetune", "intermediate")},
        ("seed", "model", "segment"),
        _DENSE_CODE,
        "dense",
        "Model",
        _A100,
    ),
    Stage(
        "evaluate",
        {**_DATA, "weights": ("finetune", "intermediate", "pretrain")},
        ("seed", "model", "evaluate"),
        (*_TRAINING_CODE, "benchmarks/model_cost.py", "benchmarks/throughput.py"),
        "train",
        "Artifact",
        _ONE_GPU,
    ),
    Stage(
        "report",
        {name: (name,) for name in _RESULTS},
        (
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
        (
            *_CONTRACTS,
            "contracts/graph.py",
            "config",
            "papers",
            "report",
        ),
        "train",
        "Report",
        _SMALL,
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
