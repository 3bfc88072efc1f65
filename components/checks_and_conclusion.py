"""Components of tasks that run no stage: the checks of a cluster before, what is said of a run behind.

Those of a recipe have the parameters of the report's component, so that they read the same recipe. None of
them takes artifacts.
"""

# Not `from __future__ import annotations`: kfp reads the annotations as objects, not as strings.

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT
from kfp.dsl.base_component import BaseComponent

from components.stage_component import PARAMETERS, pages_of
from vitpipe.config.pipeline_parameters import OVERRIDES, parameter_of
from vitpipe.contracts.graph import Image, Stage
from vitpipe.stages.pipeline_run import (
    CHECK,
    CODE_DIGESTS,
    COMPARISON,
    CONCLUSION,
    ROWS,
    SEEDS,
    STATUS,
    TABLE_PAGES,
)


def conclusion_component(report: Stage, upstream: Sequence[str]) -> BaseComponent:
    """After a failure, the report of what has finished: the outputs are those of the stage `report`.

    Args:
        report: the entry of that stage.
        upstream: stages whose overrides it takes as parameters of their own.
    """
    interface = {
        **_parameters(upstream),
        STATUS: dsl.PipelineTaskFinalStatus,
        "out": dsl.Output[getattr(dsl, report.kind)],
        **pages_of(report),
        "metrics": dsl.Output[dsl.Metrics],
    }
    about = "After a failure, report what has finished."
    return _component(CONCLUSION, report.image, about, interface)


def comparison_component(image: Image, table: str) -> BaseComponent:
    """At the end of a table's pipeline, our results beside the published ones: `table.html`, `table.md`.

    Args:
        image: of the stage `report`.
        table: `PAPER/NUMBER`.
    """
    interface = {
        "profile": str,
        OVERRIDES: list[str],
        SEEDS: int,
        ROWS: list[str],
        STATUS: dsl.PipelineTaskFinalStatus,
        "out": dsl.Output[dsl.Artifact],
        **{name: dsl.Output[getattr(dsl, kind)] for name, kind in TABLE_PAGES.items()},
        "metrics": dsl.Output[dsl.Metrics],
    }
    about = "Put the results of all runs beside the published ones."
    return _component(COMPARISON, image, about, interface, options=["--table", table])


def check_component(
    name: str, image: Image, upstream: Sequence[str], options: Sequence[str]
) -> BaseComponent:
    """Before the first stage, check a pod; `out` holds what was found.

    Args:
        name: of the task; it differs between the images.
        upstream: as above.
        options: of `vitpipe check-pod`: what to check.
    """
    interface = {**_parameters(upstream), CODE_DIGESTS: str, "out": dsl.Output[dsl.Artifact]}
    about = "Check volumes, GPUs, MLflow and code before hours of work."
    return _component(name, image, about, interface, verb=CHECK, options=options)


def _parameters(upstream: Sequence[str]) -> dict[str, Any]:
    """What a stage's component has for its recipe."""
    return {**PARAMETERS, **{parameter_of(stage): list[str] for stage in upstream}}


def _component(
    name: str,
    image: Image,
    about: str,
    interface: Mapping[str, Any],
    *,
    verb: str = "",
    options: Sequence[str] = (),
) -> BaseComponent:
    """A task of the verb that it is named after, or of another one.

    Args:
        interface: parameter or output -> annotation; `recipe` and `profile` go to the command line.
    """
    named = [key for key in ("recipe", "profile") if key in interface]

    # As in `component_of`: kfp calls it by position, in the order of the interface.
    def run_task(*given: Any) -> dsl.ContainerSpec:
        values = dict(zip(interface, given, strict=False))
        chosen = [part for key in named for part in (f"--{key}", values[key])]
        return dsl.ContainerSpec(
            image=f"vitpipe-{image}",
            command=["vitpipe", verb or name],
            args=[*chosen, "--executor-input", EXECUTOR_INPUT, *options],
        )

    run_task.__name__, run_task.__doc__ = name.replace("-", "_"), about
    run_task.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for key, annotation in interface.items()
        ],
        return_annotation=dsl.ContainerSpec,
    )
    return dsl.container_component(run_task)
