"""The rows of a published table as one Kubeflow pipeline: a stage that several rows share is one task.

The last task puts the results beside the published ones, whatever became of the runs.

Recipe and seed of a task are fixed when the pipeline is compiled; overrides stay a parameter of the run.
"""

# No `from __future__ import annotations` here: kfp's decorators read the annotations as objects, not as
# strings.

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.checks_and_conclusion import comparison_component
from components.stage_component import component_of
from pipelines.compile import check_package_path, default_images, write_package
from pipelines.package import Package, check_carried_texts, check_texts
from pipelines.place import place
from pipelines.placement import Placement
from pipelines.several_nodes import job_arguments
from vitpipe.config.carried import carried_recipe, is_fixed
from vitpipe.contracts.graph import Image, all_stages, graph_of
from vitpipe.contracts.units import counted
from vitpipe.stages.pipeline_run import COMPARISON
from vitpipe.tables.table_plan import StageWork, TablePlan


def compile_table(
    plan: TablePlan,
    out: Path,
    *,
    images: Mapping[Image, str] | None = None,
    placement: Placement | None = None,
) -> Package:
    """Compile the selected rows of a table into `out`; what is finished here is in it, too.

    Args:
        out: file ending in .yaml.
        images: image reference for `train` and `dense`; default: `default_images`.
        placement: a cluster's labels and volumes; none by default.

    Raises:
        InputError: `out` does not end in .yaml or is another file, or an override is refused.
        StorageError: when the disk refuses the write.
    """
    check_texts((plan.name, plan.profile, *plan.overrides), "table, profile and overrides")
    check_package_path(out)
    for run, _ in plan.started_runs():
        check_carried_texts(run.name, plan.profile)
        run.recipe.data.require_root(f"recipe {run.name}, profile {plan.profile}")
    chosen = {**default_images(), **(images or {})}
    return write_package(table_pipeline(plan, chosen, placement or Placement()), out)


def table_pipeline(plan: TablePlan, images: Mapping[Image, str], placement: Placement) -> BaseComponent:
    """Build the pipeline of a table.

    Args:
        images: image reference by kind, preferably with a digest.
        placement: which nodes the tasks may run on.
    """
    for_all = [text for text in plan.overrides if not is_fixed(text)]

    @dsl.pipeline(
        name=table_pipeline_name(plan),
        description=f"Table {plan.name}, profile {plan.profile}, {counted(plan.num_seeds, 'seed')}",
    )
    def pipeline(
        overrides: list[str] = for_all,
        data_digest: str = "",
    ) -> None:
        report = all_stages()["report"]
        end = comparison_component(report.image, plan.name)(
            profile=plan.profile,
            # Its parameter is the run's: with other values the stages have other digests.
            overrides=overrides,
            seeds=plan.num_seeds,
            rows=list(plan.conditions),
        )
        first = next(run.recipe for run, _ in plan.started_runs())
        place(end, replace(report, name=COMPARISON), first, placement, images[report.image])
        # What it finds on the volume of the states is no input that Kubeflow's cache could compare.
        end.set_caching_options(enable_caching=False)
        end.set_display_name("compare-table: our results beside the published ones")
        with dsl.ExitHandler(end, name="runs"):
            _make_stages(plan, images, placement, {"overrides": overrides, "data_digest": data_digest})

    return pipeline


def _make_stages(
    plan: TablePlan, images: Mapping[Image, str], placement: Placement, shared: Mapping[str, Any]
) -> None:
    """One task for each piece of work.

    Args:
        shared: kfp's placeholders of the pipeline's parameters, which all tasks have.
    """
    tasks: dict[str, dsl.PipelineTask] = {}
    for run, stages in plan.started_runs():
        nodes = graph_of(run.recipe.stages, run.recipe.start_from)
        for work in stages:
            if work.key in tasks:
                continue  # the same work on the same inputs: its output serves this run, too
            inputs = {name: run.stages[feeder].key for name, feeder in work.node.inputs.items()}
            stage, image = work.node.stage, images[work.node.stage.image]
            task = component_of(stage, (), job_arguments(stage, work.recipe, placement, image))(
                recipe=run.name,
                profile=plan.profile,
                recipe_values=carried_recipe(run.name, work.recipe, work.node, nodes),
                fixed_overrides=_seed_of(work, plan),
                # As in `reproduce`: KFP's cache sees neither the code in an image nor a volume's files.
                code_digest=work.identity["code_digest"],
                **shared,
                **{name: tasks[key].outputs["out"] for name, key in inputs.items()},
            )
            place(task, stage, work.recipe, placement, image)
            task.set_display_name(f"{run.title}: {work.name}")
            tasks[work.key] = task


def table_pipeline_name(plan: TablePlan) -> str:
    """`itpn/main-3` at profile `full` is `table-itpn-main-3-full`: lower case, digits and hyphens."""
    text = f"table-{plan.name}-{plan.profile}".lower()
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def _seed_of(work: StageWork, plan: TablePlan) -> list[str]:
    """The overrides that only this stage's run has."""
    return [text for text in work.overrides if text not in plan.overrides]
