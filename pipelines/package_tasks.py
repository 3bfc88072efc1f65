"""The tasks of a compiled package: order, conditions of start, and where their inputs come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import all_stages
from vitpipe.contracts.safe_yaml import SAFE_LOADER
from vitpipe.stages.pipeline_run import CHECK, COMPARISON, CONCLUSION

_VERBS = (["run"], ["launch"])  # of `vitpipe`, followed by the stage's name


@dataclass(frozen=True)
class Source:
    """Where the value of an input comes from.

    Attributes:
        kind: a constant, a parameter of the pipeline, an output of a task, the final state of tasks.
        value: the constant, or the name of the parameter or output.
        task: of an output: the task, or the group of tasks, that makes it.
    """

    kind: Literal["constant", "parameter", "output", "status"]
    value: Any = None
    task: str = ""


@dataclass(frozen=True)
class PackageTask:
    """One container of the package, or one importer.

    Attributes:
        stage: the stage that it runs; empty for a task of another kind.
        component, executor: Kubeflow's messages ComponentSpec and ExecutorSpec.
        after: tasks that must have ended before.
        always: it runs whatever became of those; else only when all of them have succeeded.
    """

    name: str
    component: Any
    executor: Any
    parameters: Mapping[str, Source]
    artifacts: Mapping[str, Source]
    after: frozenset[str]
    always: bool = False

    @property
    def is_importer(self) -> bool:
        """Whether it only gives an address to the tasks behind it."""
        return bool(self.executor.WhichOneof("spec") == "importer")

    @property
    def image(self) -> str:
        """The container's image; empty for an importer."""
        return "" if self.is_importer else str(self.executor.container.image)

    @property
    def words(self) -> list[str]:
        """Command and arguments with Kubeflow's placeholders; none of an importer."""
        if self.is_importer:
            return []
        return [*self.executor.container.command, *self.executor.container.args]

    @property
    def stage(self) -> str:
        """The stage that it runs; empty for a task of another kind."""
        words = self.words
        return words[2] if words[:1] == ["vitpipe"] and words[1:2] in _VERBS and len(words) > 2 else ""

    @property
    def is_ours(self) -> bool:
        """Whether it works on the run's folder: a stage, or the task at the pipeline's end."""
        return bool(self.stage) or self.words[:2] in (["vitpipe", CONCLUSION], ["vitpipe", COMPARISON])

    def is_optional(self, artifact: str) -> bool:
        """Whether it can start without this input."""
        return bool(self.component.input_definitions.artifacts[artifact].is_optional)


@dataclass
class _Groups:
    """Tasks within tasks (exit handlers, pipelines in pipelines), which are run as if they were outside.

    Attributes:
        members: group -> its tasks.
        outputs: group, output -> the task and output that it stands for.
    """

    members: dict[str, frozenset[str]] = field(default_factory=dict)
    outputs: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


def read_tasks(path: Path) -> tuple[PackageTask, ...]:
    """The tasks of a package in an order in which they can run.

    Args:
        path: a package that has passed `validate_package`.

    Raises:
        InputError: it holds loops or conditions, which are not run here.
    """
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    document = next(yaml.load_all(read_text(path), Loader=SAFE_LOADER))
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.ParseDict(
        document["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    return tuple(_in_order(flat_tasks(path, spec, deployment)))


def flat_tasks(path: Path, spec: Any, deployment: Any) -> list[PackageTask]:
    """The tasks of a package and of the groups in it, in no order.

    Args:
        path: for messages.
        spec, deployment: Kubeflow's messages PipelineSpec and PipelineDeploymentConfig.

    Raises:
        InputError: as `read_tasks`.
    """
    parameters = {name: Source("parameter", name) for name in spec.root.input_definitions.parameters}
    groups = _Groups()
    found = list(_flat(path, spec, deployment, spec.root.dag, parameters, {}, frozenset(), groups))
    return [_ungrouped(task, groups) for task in found]


def without_checks(tasks: Iterable[PackageTask]) -> tuple[PackageTask, ...]:
    """The tasks without those that check a cluster, whose volumes are not on this machine."""
    every = tuple(tasks)
    checks = {task.name for task in every if task.words[:2] == ["vitpipe", CHECK]}
    return tuple(replace(task, after=task.after - checks) for task in every if task.name not in checks)


def _flat(
    path: Path,
    spec: Any,
    deployment: Any,
    dag: Any,
    parameters: Mapping[str, Source],
    artifacts: Mapping[str, Source],
    after: frozenset[str],
    groups: _Groups,
) -> Iterator[PackageTask]:
    """The tasks of a DAG and of those within it.

    Args:
        parameters, artifacts: where the inputs of this DAG come from.
        after: tasks that must have ended before any of this DAG.
    """
    for name, task in dag.tasks.items():
        if task.WhichOneof("iterator") or task.trigger_policy.condition:
            raise InputError(
                f"The task '{name}' is a loop or has a condition, which `vitpipe local` does not run",
                where=path,
                fix="submit the package to an endpoint: vitpipe submit --package",
            )
        component = spec.components[task.component_ref.name]
        own_parameters = {key: _parameter(value, parameters) for key, value in task.inputs.parameters.items()}
        own_artifacts = {key: _artifact(value, artifacts) for key, value in task.inputs.artifacts.items()}
        before = after | frozenset(task.dependent_tasks)
        if component.WhichOneof("implementation") == "dag":
            inner = list(
                _flat(path, spec, deployment, component.dag, own_parameters, own_artifacts, before, groups)
            )
            groups.members[name] = frozenset(inner_task.name for inner_task in inner)
            for key, output in component.dag.outputs.artifacts.items():
                if output.artifact_selectors:
                    first = output.artifact_selectors[0]
                    groups.outputs[name, key] = (first.producer_subtask, first.output_artifact_key)
            yield from inner
            continue
        policy = task.TriggerPolicy.TriggerStrategy.Name(task.trigger_policy.strategy)
        yield PackageTask(
            name,
            component,
            deployment.executors[component.executor_label],
            own_parameters,
            own_artifacts,
            before,
            policy == "ALL_UPSTREAM_TASKS_COMPLETED",
        )


def _parameter(value: Any, outer: Mapping[str, Source]) -> Source:
    from google.protobuf import json_format

    kind = value.WhichOneof("kind")
    if kind == "component_input_parameter":
        return outer.get(value.component_input_parameter, Source("constant"))
    if kind == "task_output_parameter":
        taken = value.task_output_parameter
        return Source("output", taken.output_parameter_key, taken.producer_task)
    if kind == "task_final_status":
        return Source("status", task=value.task_final_status.producer_task)
    return Source("constant", json_format.MessageToDict(value.runtime_value.constant))


def _artifact(value: Any, outer: Mapping[str, Source]) -> Source:
    if value.WhichOneof("kind") == "component_input_artifact":
        return outer.get(value.component_input_artifact, Source("constant"))
    taken = value.task_output_artifact
    return Source("output", taken.output_artifact_key, taken.producer_task)


def _ungrouped(task: PackageTask, groups: _Groups) -> PackageTask:
    """The task with the names of tasks in the place of the names of groups."""

    def source(given: Source) -> Source:
        while given.kind == "output" and (given.task, given.value) in groups.outputs:
            maker, key = groups.outputs[given.task, given.value]
            given = replace(given, task=maker, value=key)
        return given

    after = set(task.after)
    while held := after & groups.members.keys():
        after = (after - held).union(*(groups.members[name] for name in held))
    return replace(
        task,
        parameters={key: source(value) for key, value in task.parameters.items()},
        artifacts={key: source(value) for key, value in task.artifacts.items()},
        after=frozenset(after),
    )


def _in_order(tasks: Iterable[PackageTask]) -> Iterator[PackageTask]:
    """Every task behind those that it waits for; of several that may start, the graph's first one."""
    # A protobuf map has no order of its own. Tasks that are no stages (checks, importers) go first.
    order = {name: number for number, name in enumerate(all_stages())}
    waiting = sorted(tasks, key=lambda task: (order.get(task.stage, -1), len(task.name), task.name))
    done: set[str] = set()
    while waiting:
        # kfp refuses circles when it compiles.
        ready = next(task for task in waiting if task.after <= done)
        waiting.remove(ready)
        done.add(ready.name)
        yield ready
