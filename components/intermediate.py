"""Intermediate: supervised fine-tuning on the larger label set before the target classes."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def intermediate(
    recipe: str,
    profile: str,
    overrides: list[str],
    stage_overrides: list[str],
    code_digest: str,
    data_digest: str,
    data: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    # Optional: without a stage upstream that has weights, the network starts from random values.
    weights: dsl.Input[dsl.Model] | None = None,
) -> dsl.ContainerSpec:
    """Fine-tune on the intermediate classes (ImageNet-22K)."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        command=["vitpipe", "run", "intermediate"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
