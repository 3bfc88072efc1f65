"""THE graph: what a stage is, and how the stages of a recipe are connected.

A stage is a folder `vitpipe/stages/NAME/` with its entry in `config.py` and its work in `stage.py`. The
sections of recipes, `dvc.yaml`, the Kubeflow components and order and headline of the report follow from the
entries. A recipe names its stages; `graph_of` connects those that are there, so a method without intermediate
fine-tuning simply has `finetune` fed by `pretrain`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from vitpipe.contracts.discovery import names_in, part_of, source_of
from vitpipe.contracts.errors import InputError

Image = Literal["train", "dense"]
Kind = Literal["Dataset", "Model", "Artifact"]
STAGE_PACKAGE = "vitpipe.stages"
CLASSES = "classes"  # the kind of a dataset of images with classes
PICTURES = "pictures"  # a dataset of any kind, of which only the pictures are read
# What a family of networks may be built as; each is a function of `models.families.Family`.
NetworkKind = Literal[
    "encoder", "classifier", "intermediate_heads", "pretrainer", "feature_predictor", "dense"
]


@dataclass(frozen=True)
class Resources:
    """What a stage asks of a cluster node: GPUs, CPU cores, memory and /dev/shm in GiB, retries."""

    gpus: int
    cpus: float
    memory_gib: float
    shm_gib: float
    retries: int


# An A100 node of eight GPUs, the smallest node with one, and nodes without any. Of the 12 cores and 85 GiB of
# a2-highgpu-1g a pod gets 11 and 76.
EIGHT_GPUS = Resources(gpus=8, cpus=88, memory_gib=640, shm_gib=64, retries=5)
ONE_GPU = Resources(gpus=1, cpus=10, memory_gib=64, shm_gib=8, retries=3)
MANY_CORES = Resources(gpus=0, cpus=16, memory_gib=64, shm_gib=8, retries=3)
TWO_CORES = Resources(gpus=0, cpus=2, memory_gib=8, shm_gib=1, retries=2)
DATA = {"data": ("prepare",)}


@dataclass(frozen=True)
class Stage:
    """The entry of one stage.

    Attributes:
        name: as in recipes and commands; also the name of its folder and of its recipe section.
        order: position in lists and in the report; what feeds a stage has a lower one. Ours are multiples of
            ten.
        summary: what it does, as a phrase.
        inputs: input name -> the stages that may feed it, best first; the first one present is taken.
        takes_every_stage: one input for each stage of a lower order, by its name, instead of `inputs`.
        sections: top-level recipe keys that the stage reads; others do not re-run it. Only `prepare` reads
            `data`: what it makes of it reaches the others as their input folder.
        reads: kind of the dataset that it reads, as in the catalogue: `CLASSES`, or a layout such as `coco`;
            `PICTURES` for any kind. Its section names the dataset, or its weights' card.
        builds: what the stage itself builds of the recipe's network; what a method builds says its settings.
        kind: Kubeflow's type of the output folder.
        pages: outputs of their own in Kubeflow: stem of a file in the folder -> Kubeflow's type.
        headline: the main metric, shown in the graph and on top of the report.
        curves: columns of its `curves.csv` that `dvc plots` draws.
        gives_weights: later stages may start from its weights.
        needs_weights: it measures weights; without an input that has them, or a file, there is nothing to do.
        keeps_output: the earlier output is there while it runs again, so that unchanged parts are reused.
    """

    name: str
    order: int
    summary: str
    sections: tuple[str, ...]
    image: Image
    kind: Kind
    resources: Resources
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_every_stage: bool = False
    reads: str = ""
    builds: tuple[NetworkKind, ...] = ()
    pages: Mapping[str, str] = field(default_factory=dict)
    headline: str = ""
    curves: tuple[str, ...] = ()
    gives_weights: bool = False
    needs_weights: bool = False
    keeps_output: bool = False

    @property
    def module(self) -> str:
        """Import name of the module with its `run`."""
        return f"{STAGE_PACKAGE}.{self.name}.stage"


@dataclass(frozen=True)
class Node:
    """A stage in the graph of one recipe: `inputs` maps input name -> upstream stage."""

    stage: Stage
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@functools.cache
def all_stages() -> dict[str, Stage]:
    """Every stage that there is by name, in running order.

    Raises:
        InputError: when an entry is missing or cannot be connected.
    """
    folders = {
        name: part_of(STAGE_PACKAGE, name, "config", "STAGE", Stage) for name in names_in(STAGE_PACKAGE)
    }
    orders = {stage.name: stage.order for stage in folders.values()}
    for folder, stage in folders.items():
        for what, fix in _mistakes(folder, stage, orders):
            raise InputError(what, where=stage_config_file(folder), fix=fix)
    found = sorted(folders.values(), key=lambda stage: (stage.order, stage.name))
    complete = [
        replace(stage, inputs={other.name: (other.name,) for other in found if other.order < stage.order})
        if stage.takes_every_stage
        else stage
        for stage in found
    ]
    return {stage.name: stage for stage in complete}


def stage_config_file(name: str) -> str:
    """The file of a stage's entry, for messages."""
    return str(source_of(f"{STAGE_PACKAGE}.{name}.config"))


def _mistakes(folder: str, stage: Stage, orders: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """What would fail later, or in a stage's place do something else: (what is wrong, fix)."""
    if stage.name != folder:
        yield f"The stage '{stage.name}' lies in the folder {folder}", "give both the same name"
    if not stage.summary:
        yield f"The stage '{folder}' has no summary", "say as a phrase what it does"
    for given, known in ((stage.image, Image), (stage.kind, Kind)):
        if given not in get_args(known):
            yield f"The stage '{folder}' names '{given}'", f"choose one of: {', '.join(get_args(known))}"
    for name, feeders in stage.inputs.items():
        if not isinstance(feeders, tuple):
            yield (
                f"Input '{name}' of the stage '{folder}' is not a tuple",
                f'write for example ("{feeders}",)',
            )
            return
        for feeder in feeders:
            if feeder not in orders:
                listed = ", ".join(sorted(orders, key=lambda other: orders[other]))
                yield (
                    f"Input '{name}' of the stage '{folder}' comes from '{feeder}', which is no stage",
                    f"name one of: {listed}",
                )
            elif orders[feeder] >= stage.order:
                yield (
                    f"The stage '{folder}' (order {stage.order}) is fed by '{feeder}', which does not come "
                    f"before it (order {orders[feeder]})",
                    f"give it an order above {orders[feeder]}",
                )


def graph_of(stages: Iterable[str], start_from: Mapping[Any, str] | None = None) -> tuple[Node, ...]:
    """Connect the named stages in running order.

    An input for which no feeding stage is named is left out: `finetune` without any pre-training
    starts from random weights.

    Args:
        start_from: stage -> the stage whose weights it takes, where that is not the first one present.
    """
    present, chosen = set(stages), start_from or {}
    nodes = []
    for stage in all_stages().values():
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
