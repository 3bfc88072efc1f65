"""Prepare: raw images to verified tar shards, manifests and dense folders."""

from kfp import dsl
from kfp.dsl import PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER as EXECUTOR_INPUT


@dsl.container_component
def prepare(
    recipe: str,
    profile: str,
    overrides: list[str],
    stage_overrides: list[str],
    code_digest: str,
    data_digest: str,
    # The raw data are no input: KFP copies every input artifact into the pod. They are mounted instead.
    out: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Pack and verify the datasets that the recipe's stages read."""
    return dsl.ContainerSpec(
        image="vitpipe-train",
        # Always set: on a cluster, KFP's launcher replaces the entrypoint of the image by this command.
        command=["vitpipe", "run", "prepare"],
        # Overrides and digests are not passed here: `vitpipe run` reads them from the executor input, where
        # lists stay lists. As arguments they would be one JSON text each.
        args=["--recipe", recipe, "--profile", profile, "--executor-input", EXECUTOR_INPUT],
    )
