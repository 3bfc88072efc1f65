"""Probe: k-nearest-neighbour and linear classification on frozen features."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def probe(
    recipe: str,
    profile: str,
    overrides: list[str],
    stage_overrides: list[str],
    code_digest: str,
    data_digest: str,
    data: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    weights: dsl.Input[dsl.Model] | None = None,
) -> dsl.ContainerSpec:
    """Evaluate the frozen features: k-nearest neighbours and a linear classifier."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        command=["vitpipe", "run", "probe"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
