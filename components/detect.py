"""Detect: object detection and instance segmentation on COCO."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def detect(
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
    """Train and evaluate a detector (boxes and masks) from the pre-trained weights."""
    return dsl.ContainerSpec(
        # The image with mmdet and mmseg, which only detect and segment need.
        image="vitpipe-dense",
        command=["vitpipe", "run", "detect"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
