"""What the first tasks of a package check: volumes, /dev/shm, GPUs, MLflow, and the code of each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipelines.place import resources_of
from pipelines.placement import Placement, StagePlace
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Resources, Stage

# A pod that starts, looks and ends; tried again while a node or MLflow is not ready yet.
_SMALL = Resources(gpus=0, cpus=1, memory_gib=4, shm_gib=1, retries=3)
# One GPU shows driver and device plugin; torch's CUDA libraries take gigabytes of memory.
_WITH_GPU = Resources(gpus=1, cpus=2, memory_gib=16, shm_gib=1, retries=3)
_LIMIT_HOURS = 1.0  # of a look that takes seconds, beside pulling images of gigabytes


@dataclass(frozen=True)
class Check:
    """One task that runs `vitpipe check-pod`.

    Attributes:
        stage: name, image and resources, as those of a stage, by which the task is placed.
        options: of the verb.
        placement: the cluster's, with this task's time limit.
    """

    stage: Stage
    options: tuple[str, ...]
    placement: Placement


def checks_of(stages: Sequence[Stage], recipe: Recipe, placement: Placement) -> Iterator[Check]:
    """The checks before a recipe's stages; none without a described cluster.

    Args:
        stages: those that run.
    """
    if placement == Placement():
        return
    for image in dict.fromkeys(stage.image for stage in stages):
        first = next(stage for stage in stages if stage.image == image)
        summary = "volumes, MLflow and code" if image == "train" else "code"
        options = ("--shm-gib", f"{_SMALL.shm_gib:g}", *(_volumes(placement) if image == "train" else ()))
        yield _check(f"check-{image}", first, _SMALL, summary, options, placement)
    resources = [resources_of(stage, recipe, placement) for stage in stages]
    if any(found.gpus for found in resources):
        first = next(stage for stage, found in zip(stages, resources, strict=True) if found.gpus)
        yield _check("check-gpu", first, _WITH_GPU, "GPU and driver", ("--gpus", "1"), placement)


def _check(
    name: str,
    like: Stage,
    resources: Resources,
    summary: str,
    options: tuple[str, ...],
    placement: Placement,
) -> Check:
    """A check in the image of the stage `like`."""
    stage = replace(like, name=name, resources=resources, summary=f"{summary} of a pod", inputs={}, pages={})
    limited = placement.model_copy(update={"stages": {name: StagePlace(timeout_hours=_LIMIT_HOURS)}})
    return Check(stage, options, limited)


def _volumes(placement: Placement) -> Iterator[str]:
    state, data = placement.claims.state, placement.claims.data
    if state is not None:
        yield from ("--writable", state.path)
    if data is not None:
        yield from ("--readable", data.path)
    if placement.tracking is not None:
        yield "--mlflow"
