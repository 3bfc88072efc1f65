"""One recipe as a Kubeflow pipeline: its stages in running order, each fed by the stages before it.

The recipe's values travel in the package; overrides stay parameters of the run, one for each stage.
"""

# No `from __future__ import annotations` here: kfp's decorators read the annotations as objects, not as
# strings.

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.checks_and_conclusion import check_component, conclusion_component
from components.stage_component import component_of
from pipelines.cluster_checks import checks_of
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
from vitpipe.contracts.graph import Image, Node, Stage, graph_of
from vitpipe.stages.pipeline_run import CODE_DIGESTS, CONCLUSION
from vitpipe.stages.run import identity_of

_REPORT = "report"


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
    addresses = imported or {}
    defaults: dict[str, list[str] | str] = {
        **split_overrides(overrides, [node.name for node in nodes if node.name not in addresses]),
        "data_digest": data_digest,
        **{address_parameter(stage): address for stage, address in addresses.items()},
    }

    def pipeline(*given: Any) -> None:
        parameters = dict(zip(defaults, given, strict=True))
        _Tasks(name, chosen, images, placement, addresses, nodes, parameters).make_all()

    # One parameter per stage of this recipe: kfp reads them from the signature of a function.
    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(key, default) for key, default in defaults.items()], return_annotation=None
    )
    about = f"{chosen.summary} (recipe {name}, profile {chosen.profile})"
    return dsl.pipeline(name=pipeline_name(chosen), description=about)(pipeline)


@dataclass(frozen=True)
class _Tasks:
    """The tasks of one recipe; kfp collects them while its pipeline function runs.

    Attributes:
        addresses: stage -> address of its finished output.
        nodes: all stages in running order.
        parameters: kfp's placeholders of the pipeline's parameters.
    """

    name: str
    recipe: Recipe
    images: Mapping[Image, str]
    placement: Placement
    addresses: Mapping[str, str]
    nodes: Sequence[Node]
    parameters: Mapping[str, Any]

    def make_all(self) -> None:
        """The stages, before them checks, and behind them the task that reports on a run that has failed."""
        report = next((node for node in self.nodes if node.name == _REPORT), None)
        if report is None:
            self._make_stages()
            return
        task = conclusion_component(report.stage, self._behind(report))(**self._shared(report))
        end = replace(report.stage, name=CONCLUSION)  # a label of its own
        place(task, end, self.recipe, self.placement, self.images[end.image])
        # What it finds on the volume of the states is no input that Kubeflow's cache could compare.
        task.set_caching_options(enable_caching=False)
        task.set_display_name("conclude: after a failure, the report of what has finished")
        # Not `ignore_upstream_failure` on the report: Kubeflow would start one for each task before it, and
        # fails a task that takes an output which a failed one has not made, even an optional one.
        with dsl.ExitHandler(task, name="stages"):
            self._make_stages()

    def _make_stages(self) -> None:
        outputs: dict[str, Any] = {}
        checks = list(self._make_checks())
        for node in self.nodes:
            if node.name in self.addresses:
                outputs[node.name] = _imported(node.stage, self.parameters[address_parameter(node.name)])
                continue
            image = self.images[node.stage.image]
            job = job_arguments(node.stage, self.recipe, self.placement, image)
            feeders = {key: outputs[feeder] for key, feeder in node.inputs.items()}
            task = component_of(node.stage, self._behind(node), job)(**self._shared(node), **feeders)
            place(task, node.stage, self.recipe, self.placement, image)
            task.set_display_name(f"{node.name}: {node.stage.summary}")
            if not node.inputs or all(feeder in self.addresses for feeder in node.inputs.values()):
                task.after(*checks)
            outputs[node.name] = task.outputs["out"]

    def _make_checks(self) -> Iterator[dsl.PipelineTask]:
        """One task per image and one on a node with GPUs; none where no cluster is described."""
        stages = [node.stage for node in self.nodes if node.name not in self.addresses]
        for check in checks_of(stages, self.recipe, self.placement):
            last = self.nodes[-1]
            digests = {
                stage.name: identity_of(self.recipe, stage)["code_digest"]
                for stage in stages
                if stage.image == check.stage.image
            }
            given = {**self._shared(last), CODE_DIGESTS: json.dumps(digests, sort_keys=True)}
            component = check_component(
                check.stage.name, check.stage.image, self._behind(last), check.options
            )
            task = component(**given)
            place(task, check.stage, self.recipe, check.placement, self.images[check.stage.image])
            task.set_caching_options(enable_caching=False)  # the cluster may have changed since
            task.set_display_name(f"{check.stage.name}: {check.stage.summary}")
            yield task

    def _behind(self, node: Node) -> list[str]:
        """The stages whose overrides a task takes."""
        return [stage for stage in upstream_of(self.nodes)[node.name] if stage not in self.addresses]

    def _shared(self, node: Node) -> dict[str, Any]:
        """Arguments of a task that come from no other task."""
        given = (OVERRIDES, "data_digest", *map(parameter_of, self._behind(node)))
        return {
            "recipe": self.name,
            "profile": self.recipe.profile,
            "recipe_values": carried_recipe(self.name, self.recipe, node, self.nodes),
            "fixed_overrides": [],
            # KFP's cache key is made of component, image reference, command and inputs. It sees neither the
            # code inside an image nor the files of a volume, so both enter as inputs.
            "code_digest": identity_of(self.recipe, node.stage)["code_digest"],
            **{key: self.parameters[key] for key in given},
        }


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
