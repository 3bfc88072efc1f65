"""Evaluate: accuracy, cost and throughput of the trained classifier."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def evaluate(
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
    """Evaluate the fine-tuned network again, independently of its training stage."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        command=["vitpipe", "run", "evaluate"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
