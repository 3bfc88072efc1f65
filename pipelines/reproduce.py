"""One recipe as a Kubeflow pipeline: its stages in running order, each fed by the stages before it.

The recipe's values travel in the package; overrides stay a parameter of the run.
"""

# No `from __future__ import annotations` here: kfp's decorators read the annotations as objects, not as
# strings.

from collections.abc import Iterable, Mapping, Sequence

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.stage_component import component_of
from pipelines.placement import Placement, place, resources_of
from vitpipe.config.carried import carried_recipe, is_fixed
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Image, Node, graph_of
from vitpipe.stages.run import identity_of


def reproduce(
    name: str, chosen: Recipe, overrides: Sequence[str], images: Mapping[Image, str], placement: Placement
) -> BaseComponent:
    """Build the pipeline of one recipe.

    Args:
        name: by which the recipe was read.
        chosen: the recipe with the overrides in it; its stages are the tasks.
        overrides: the same overrides as texts, `section.key=value`.
        images: image reference by kind, preferably with a digest.
        placement: which nodes the tasks may run on.
    """
    # The graph is fixed at compile time. A flag of the run is not possible: kfp refuses a task that depends
    # on a task inside `dsl.If` (InvalidTopologyException), and `dsl.OneOf` of artifacts does not run locally.
    nodes = graph_of(chosen.stages, chosen.start_from)
    for_all, for_one = split_overrides(overrides, nodes)

    @dsl.pipeline(name=pipeline_name(chosen), description=chosen.summary)
    def pipeline(
        overrides: list[str] = for_all,
        data_digest: str = "",
    ) -> None:
        tasks: dict[str, dsl.PipelineTask] = {}
        for node in nodes:
            task = component_of(node.stage)(
                recipe=name,
                profile=chosen.profile,
                recipe_values=carried_recipe(name, chosen, node, nodes),
                overrides=overrides,
                stage_overrides=for_one[node.name],
                # KFP's cache key is made of component, image reference, command and inputs. It sees neither
                # the code inside an image nor the files of a volume, so both enter as inputs.
                code_digest=identity_of(chosen, node.stage)["code_digest"],
                data_digest=data_digest,
                **{name: tasks[feeder].outputs["out"] for name, feeder in node.inputs.items()},
            )
            # The cache key holds the image reference only: with a tag, a rebuilt image goes unnoticed.
            task.set_container_image(images[node.stage.image])
            place(task, resources_of(node.stage, chosen), placement)
            tasks[node.name] = task

    return pipeline


def split_overrides(
    overrides: Sequence[str], nodes: Iterable[Node]
) -> tuple[list[str], dict[str, list[str]]]:
    """(overrides for every task, task -> overrides of its own section and of the sections upstream).

    An override of `finetune.epochs` reaches `finetune` and the tasks downstream; `pretrain` stays cached.
    """
    # KFP runs a task again when one of its parameters changes, so a task must get no override of a section
    # that it does not depend on. The tasks downstream run again anyway, and they read the same recipe.
    overrides = [text for text in overrides if not is_fixed(text)]  # carried with the recipe
    before: dict[str, set[str]] = {}
    for node in nodes:
        before[node.name] = {node.name}.union(*(before[feeder] for feeder in node.inputs.values()))
    for_all = [text for text in overrides if _section(text) not in before]
    for_one = {
        name: [text for text in overrides if _section(text) in sections] for name, sections in before.items()
    }
    return for_all, for_one


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].strip()


def pipeline_name(recipe: Recipe) -> str:
    """`itpn/pixel_base` at profile `demo` is `itpn-pixel-base-demo`."""
    # kfp allows lower-case letters, digits and hyphens. Its cache is per pipeline name, so the name has no
    # time.
    text = f"{recipe.name.removesuffix('.yaml')}-{recipe.profile}".lower()
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())
