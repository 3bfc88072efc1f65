"""The component of the task at a pipeline's end: the report of a run that has failed, in Kubeflow's terms.

Its parameters are those of the report's component, and `status`, which Kubeflow fills in. It has no inputs
but these: what the stages have left lies on the volume of the states.
"""

# Not `from __future__ import annotations`: kfp reads the annotations as objects, not as strings.

import inspect
from collections.abc import Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT
from kfp.dsl.base_component import BaseComponent

from components.stage_component import PARAMETERS, pages_of
from vitpipe.config.pipeline_parameters import parameter_of
from vitpipe.contracts.graph import Stage
from vitpipe.stages.pipeline_run import CONCLUSION, STATUS


def conclusion_component(report: Stage, upstream: Sequence[str]) -> BaseComponent:
    """The component, with the report's outputs.

    Args:
        report: the entry of the stage `report`.
        upstream: stages whose overrides it takes as parameters of their own.
    """

    # As in `component_of`: kfp calls it by position.
    def run_conclusion(recipe: str, profile: str, *others: Any) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(
            image=f"vitpipe-{report.image}",
            command=["vitpipe", CONCLUSION],
            args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
        )

    run_conclusion.__name__ = CONCLUSION
    run_conclusion.__doc__ = "After a failure, report what has finished."
    interface = {
        **PARAMETERS,
        **{parameter_of(name): list[str] for name in upstream},
        STATUS: dsl.PipelineTaskFinalStatus,
        "out": dsl.Output[getattr(dsl, report.kind)],
        **pages_of(report),
        "metrics": dsl.Output[dsl.Metrics],
    }
    run_conclusion.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for name, annotation in interface.items()
        ],
        return_annotation=dsl.ContainerSpec,
    )
    return dsl.container_component(run_conclusion)
