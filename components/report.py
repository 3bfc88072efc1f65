"""Report: comparison of every result with the published row that the recipe reproduces."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def report(
    recipe: str,
    profile: str,
    overrides: list[str],
    stage_overrides: list[str],
    code_digest: str,
    data_digest: str,
    prepare: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    # A type of its own, so that Kubeflow shows the page in its interface.
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    pretrain: dsl.Input[dsl.Model] | None = None,
    intermediate: dsl.Input[dsl.Model] | None = None,
    finetune: dsl.Input[dsl.Model] | None = None,
    probe: dsl.Input[dsl.Artifact] | None = None,
    detect: dsl.Input[dsl.Model] | None = None,
    segment: dsl.Input[dsl.Model] | None = None,
    evaluate: dsl.Input[dsl.Artifact] | None = None,
) -> dsl.ContainerSpec:
    """Write the report that compares the run with the published results."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        command=["vitpipe", "run", "report"],
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
