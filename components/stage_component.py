"""The Kubeflow component of a stage, from its entry in the graph.

Its parameters:

    recipe, profile     names of a recipe and of a profile (size)
    recipe_values       the values of that recipe which decide this stage, compressed (`config.carried`)
    overrides           `section.key=value`, for every stage of the run
    STAGE_overrides     of this stage and of each upstream; a change leaves all other stages in the cache
    fixed_overrides     what the package has fixed, such as the seed of a table's row
    code_digest         of the code of this stage: KFP's cache does not see the content of an image
    data_digest         of the raw data: KFP's cache does not see the content of a mounted volume

Raw data are no input: KFP copies every input artifact into the pod. They are mounted instead.
Outputs: `out`, the stage's folder with its card.json, `metrics`, and the pages that the entry names.
An input that defaults to None is left unconnected in a recipe without a stage that provides it.
"""

# Not `from __future__ import annotations`: kfp reads the annotations as objects, not as strings.

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT
from kfp.dsl.base_component import BaseComponent

from vitpipe.config.pipeline_parameters import FIXED_OVERRIDES, OVERRIDES, parameter_of
from vitpipe.contracts.graph import Stage, all_stages

PARAMETERS = {
    "recipe": str,
    "profile": str,
    "recipe_values": str,
    OVERRIDES: list[str],
    FIXED_OVERRIDES: list[str],
    "code_digest": str,
    "data_digest": str,
}
# Only the data are always there; without a stage upstream that has weights, a network starts at random.
_ALWAYS = ("prepare",)


def component_of(stage: Stage, upstream: Sequence[str] = (), job: Sequence[str] = ()) -> BaseComponent:
    """The container component of a stage: its inputs, outputs, image and command.

    Args:
        upstream: stages whose overrides it takes as parameters of their own, itself among them.
        job: arguments of `vitpipe launch`, for a stage that runs on several nodes.
    """

    # kfp calls it once, by position, with a placeholder for each of the parameters below.
    def run_stage(recipe: str, profile: str, *others: Any) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(
            image=f"vitpipe-{stage.image}",
            # Always set: on a cluster, KFP's launcher replaces the entrypoint of the image by this command.
            command=["vitpipe", "launch" if job else "run", stage.name],
            # Values, overrides and digests are not passed here: `vitpipe run` reads them from the executor
            # input, where lists stay lists. As arguments they would be one JSON text each.
            args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT, *job],
        )

    # kfp takes name, description and interface of a component from a function.
    run_stage.__name__ = stage.name
    run_stage.__doc__ = f"{stage.summary[0].upper()}{stage.summary[1:]}."
    run_stage.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*map(_parameter, _interface(stage, upstream).items()), *_optional_inputs(stage)],
        return_annotation=dsl.ContainerSpec,
    )
    return dsl.container_component(run_stage)


def _interface(stage: Stage, upstream: Sequence[str]) -> dict[str, Any]:
    """Name -> annotation of the parameters, the inputs that are always there, and the outputs."""
    required = {name: _input(feeders) for name, feeders in stage.inputs.items() if feeders == _ALWAYS}
    out = {"out": dsl.Output[getattr(dsl, stage.kind)]}
    of_stages = {parameter_of(name): list[str] for name in upstream}
    return {
        **PARAMETERS,
        **of_stages,
        **required,
        **out,
        **pages_of(stage),
        "metrics": dsl.Output[dsl.Metrics],
    }


def pages_of(stage: Stage) -> dict[str, Any]:
    """Name -> annotation of the outputs that Kubeflow shows on pages of its own."""
    return {name: dsl.Output[getattr(dsl, kind)] for name, kind in stage.pages.items()}


def _optional_inputs(stage: Stage) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_input(feeders) | None
        )
        for name, feeders in stage.inputs.items()
        if feeders != _ALWAYS
    ]


def _parameter(named: tuple[str, Any]) -> inspect.Parameter:
    return inspect.Parameter(named[0], inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=named[1])


def _input(feeders: tuple[str, ...]) -> Any:
    kinds = {all_stages()[feeder].kind for feeder in feeders}
    # Feeders of different kinds have only the base type in common.
    return dsl.Input[getattr(dsl, kinds.pop() if len(kinds) == 1 else "Artifact")]


def components() -> Mapping[str, BaseComponent]:
    """The component of every stage by name, in the order of the graph."""
    return {name: component_of(stage) for name, stage in all_stages().items()}
