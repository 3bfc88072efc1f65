"""Pretrain: self-supervised pre-training on the prepared images."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def pretrain(
    recipe: str,
    profile: str,
    overrides: list[str],
    stage_overrides: list[str],
    code_digest: str,
    data_digest: str,
    data: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Pre-train the network on the prepared images without labels."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        command=["vitpipe", "run", "pretrain"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
