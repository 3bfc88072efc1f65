"""Names of a pipeline's parameters that hold overrides, and which override belongs to which.

    overrides            of every stage: seed=1, data.root=/data
    finetune_overrides   of one stage: finetune.epochs=50
    fixed_overrides      what the package itself has fixed for a task, such as the seed of a table's row
    pretrain_address     where a finished output lies that takes the place of a stage

Kubeflow runs a task again when one of its parameters changes. So a task takes the parameters of its own stage
and of those upstream: a changed `finetune_overrides` leaves the pre-training in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vitpipe.config.carried import is_fixed
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import Node, all_stages

OVERRIDES, FIXED_OVERRIDES = "overrides", "fixed_overrides"
_SUFFIX = "_overrides"


def parameter_of(stage: str) -> str:
    """`finetune` -> `finetune_overrides`."""
    return f"{stage}{_SUFFIX}"


def address_parameter(stage: str) -> str:
    """`pretrain` -> `pretrain_address`."""
    return f"{stage}_address"


def stage_of_parameter(name: str) -> str:
    """`finetune_overrides` -> `finetune`; empty for a parameter of another kind."""
    stage = name.removesuffix(_SUFFIX)
    return stage if name.endswith(_SUFFIX) and stage in all_stages() else ""


def section_of(override: str) -> str:
    """`finetune.epochs=4` -> `finetune`."""
    return override.partition("=")[0].partition(".")[0].strip()


def upstream_of(nodes: Iterable[Node]) -> dict[str, tuple[str, ...]]:
    """Stage -> itself and all stages that it depends on, in running order.

    Args:
        nodes: a graph in running order.
    """
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        before = {name for feeder in node.inputs.values() for name in found[feeder]}
        found[node.name] = (*(name for name in found if name in before), node.name)
    return found


def split_overrides(overrides: Sequence[str], stages: Iterable[str]) -> dict[str, list[str]]:
    """Overrides by the parameter that takes them, one for every stage and `overrides` for the rest.

    Args:
        stages: those of the pipeline; the section of another one goes to `overrides`, where it does nothing.
    """
    found: dict[str, list[str]] = {OVERRIDES: [], **{parameter_of(stage): [] for stage in stages}}
    for text in overrides:
        if is_fixed(text):
            continue  # carried with the recipe
        own = parameter_of(section_of(text))
        found[own if own in found else OVERRIDES].append(text)
    return found


def check_section(parameter: str, texts: Iterable[str]) -> None:
    """Refuse an override in the parameter of a stage that it is not of.

    Raises:
        InputError: names it; it would change that stage behind the back of Kubeflow's cache.
    """
    stage = stage_of_parameter(parameter)
    for text in texts:
        if section_of(text) != stage:
            raise InputError(
                f"'{text}' does not belong to the stage {stage}",
                where=f"parameter '{parameter}'",
                fix=f"give it to '{parameter_of(section_of(text))}'"
                if section_of(text) in all_stages()
                else f"give it to '{OVERRIDES}'",
            )


def check_run_wide(parameters: Mapping[str, object], texts: Iterable[str]) -> None:
    """Refuse an override of one stage in `overrides`: every task would run again.

    Args:
        parameters: those of the pipeline.

    Raises:
        InputError: names it and the parameter that takes it.
    """
    for text in texts:
        own = parameter_of(section_of(text))
        if own in parameters:
            raise InputError(
                f"'{text}' is of one stage, and 'overrides' makes every task run again",
                where=f"parameter '{OVERRIDES}'",
                fix=f"give it to '{own}'",
            )
