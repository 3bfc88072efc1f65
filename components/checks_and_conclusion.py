"""Components of tasks that run no stage: the checks of a cluster before, the report of a failure behind.

Their parameters are those of the report's component, so that they read the same recipe; they take no
artifacts.
"""

# Not `from __future__ import annotations`: kfp reads the annotations as objects, not as strings.

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT
from kfp.dsl.base_component import BaseComponent

from components.stage_component import PARAMETERS, pages_of
from vitpipe.config.pipeline_parameters import parameter_of
from vitpipe.contracts.graph import Image, Stage
from vitpipe.stages.pipeline_run import CHECK, CODE_DIGESTS, CONCLUSION, STATUS


def conclusion_component(report: Stage, upstream: Sequence[str]) -> BaseComponent:
    """After a failure, the report of what has finished: the outputs are those of the stage `report`.

    Args:
        report: the entry of that stage.
        upstream: stages whose overrides it takes as parameters of their own.
    """
    interface = {
        STATUS: dsl.PipelineTaskFinalStatus,
        "out": dsl.Output[getattr(dsl, report.kind)],
        **pages_of(report),
        "metrics": dsl.Output[dsl.Metrics],
    }
    about = "After a failure, report what has finished."
    return _component(CONCLUSION, report.image, about, upstream, interface)


def check_component(
    name: str, image: Image, upstream: Sequence[str], options: Sequence[str]
) -> BaseComponent:
    """Before the first stage, check a pod; `out` holds what was found.

    Args:
        name: of the task; it differs between the images.
        upstream: as above.
        options: of `vitpipe check-pod`: what to check.
    """
    interface = {CODE_DIGESTS: str, "out": dsl.Output[dsl.Artifact]}
    about = "Check volumes, GPUs, MLflow and code before hours of work."
    return _component(name, image, about, upstream, interface, verb=CHECK, options=options)


def _component(
    name: str,
    image: Image,
    about: str,
    upstream: Sequence[str],
    interface: Mapping[str, Any],
    *,
    verb: str = CONCLUSION,
    options: Sequence[str] = (),
) -> BaseComponent:
    # As in `component_of`: kfp calls it by position.
    def run_task(recipe: str, profile: str, *others: Any) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(
            image=f"vitpipe-{image}",
            command=["vitpipe", verb],
            args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT, *options],
        )

    run_task.__name__, run_task.__doc__ = name.replace("-", "_"), about
    every = {**PARAMETERS, **{parameter_of(stage): list[str] for stage in upstream}, **interface}
    run_task.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for key, annotation in every.items()
        ],
        return_annotation=dsl.ContainerSpec,
    )
    return dsl.container_component(run_task)
