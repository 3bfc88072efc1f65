"""One recipe as a Kubeflow pipeline: its stages in running order, each fed by the stages before it.

The recipe's values travel in the package; overrides stay parameters of the run, one for each stage.
"""

# No `from __future__ import annotations` here: kfp's decorators read the annotations as objects, not as
# strings.

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.stage_component import component_of
from pipelines.place import place
from pipelines.placement import Placement
from pipelines.several_nodes import job_arguments
from vitpipe.config.carried import carried_recipe
from vitpipe.config.pipeline_parameters import (
    OVERRIDES,
    address_parameter,
    parameter_of,
    split_overrides,
    upstream_of,
)
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.graph import Image, Stage, graph_of
from vitpipe.stages.run import identity_of


def reproduce(
    name: str,
    chosen: Recipe,
    overrides: Sequence[str],
    images: Mapping[Image, str],
    placement: Placement,
    data_digest: str = "",
    imported: Mapping[str, str] | None = None,
) -> BaseComponent:
    """Build the pipeline of one recipe.

    Args:
        name: by which the recipe was read.
        chosen: the recipe with the overrides in it; its stages are the tasks.
        overrides: the same overrides as texts, `section.key=value`.
        images: image reference by kind, preferably with a digest.
        placement: the cluster.
        data_digest: default of the parameter.
        imported: stage -> address of its finished output, which takes its place.
    """
    # Fixed at compile time: kfp refuses a task that depends on one inside `dsl.If`.
    nodes = graph_of(chosen.stages, chosen.start_from)
    upstream = upstream_of(nodes)
    addresses = imported or {}
    defaults: dict[str, list[str] | str] = {
        **split_overrides(overrides, [node.name for node in nodes if node.name not in addresses]),
        "data_digest": data_digest,
        **{address_parameter(stage): address for stage, address in addresses.items()},
    }

    def pipeline(*given: Any) -> None:
        parameters = dict(zip(defaults, given, strict=True))
        outputs: dict[str, Any] = {}
        for node in nodes:
            if node.name in addresses:
                outputs[node.name] = _imported(node.stage, parameters[address_parameter(node.name)])
                continue
            behind = [stage for stage in upstream[node.name] if stage not in addresses]
            image = images[node.stage.image]
            task = component_of(node.stage, behind, job_arguments(node.stage, chosen, placement, image))(
                recipe=name,
                profile=chosen.profile,
                recipe_values=carried_recipe(name, chosen, node, nodes),
                fixed_overrides=[],
                # KFP's cache key is made of component, image reference, command and inputs. It sees neither
                # the code inside an image nor the files of a volume, so both enter as inputs.
                code_digest=identity_of(chosen, node.stage)["code_digest"],
                **{key: parameters[key] for key in (OVERRIDES, "data_digest", *map(parameter_of, behind))},
                **{name: outputs[feeder] for name, feeder in node.inputs.items()},
            )
            place(task, node.stage, chosen, placement, image)
            task.set_display_name(f"{node.name}: {node.stage.summary}")
            outputs[node.name] = task.outputs["out"]

    # One parameter per stage of this recipe: kfp reads them from the signature of a function.
    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(key, default) for key, default in defaults.items()], return_annotation=None
    )
    about = f"{chosen.summary} (recipe {name}, profile {chosen.profile})"
    return dsl.pipeline(name=pipeline_name(chosen), description=about)(pipeline)


def _imported(stage: Stage, address: Any) -> Any:
    """A finished output of a stage as an artifact; Kubeflow fetches it for each task that takes it."""
    task = dsl.importer(artifact_uri=address, artifact_class=getattr(dsl, stage.kind), reimport=False)
    task.set_display_name(f"{stage.name}: from the given address")
    return task.output


def _parameter(name: str, default: list[str] | str) -> inspect.Parameter:
    kind = list[str] if isinstance(default, list) else str
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def pipeline_name(recipe: Recipe) -> str:
    """`itpn/pixel_base` at profile `demo` is `itpn-pixel-base-demo`."""
    # kfp allows lower-case letters, digits and hyphens. Its cache is per pipeline name, so the name has no
    # time.
    text = f"{recipe.name.removesuffix('.yaml')}-{recipe.profile}".lower()
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())
