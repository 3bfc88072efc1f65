"""The tasks of a compiled package as this machine runs them: order, conditions of start, inputs, commands.

The messages are Kubeflow's own, filled in by kfp's functions, so a container sees what it sees on a cluster.
kfp's own local runner is not used: it starts nothing after a failed task, not even what shall run then, and
reports some failed containers as succeeded (kubeflow/pipelines#13332).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.executor import OUT
from vitpipe.stages.state_folder import STATES_VARIABLE

EXECUTOR_OUTPUT = "executor_output.json"
KUBEFLOW = "kubeflow"  # folder of a run: what Kubeflow's launcher reads and writes, by task
STATE_OPTION = "--state"


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
class LocalTask:
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
        """Command and arguments with Kubeflow's placeholders."""
        return [*self.executor.container.command, *self.executor.container.args]

    @property
    def stage(self) -> str:
        """The stage that it runs; empty for a task of another kind."""
        words = self.words
        return words[2] if words[:2] == ["vitpipe", "run"] and len(words) > 2 else ""

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


def read_tasks(path: Path) -> tuple[LocalTask, ...]:
    """The tasks of a package in an order in which they can run.

    Args:
        path: a package that has passed `validate_package`.

    Raises:
        InputError: it holds loops or conditions, which are not run here.
    """
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    document = next(yaml.safe_load_all(read_text(path)))
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.ParseDict(
        document["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    parameters = {name: Source("parameter", name) for name in spec.root.input_definitions.parameters}
    groups = _Groups()
    found = list(_flat(path, spec, deployment, spec.root.dag, parameters, {}, frozenset(), groups))
    return tuple(_in_order([_ungrouped(task, groups) for task in found]))


def _flat(
    path: Path,
    spec: Any,
    deployment: Any,
    dag: Any,
    parameters: Mapping[str, Source],
    artifacts: Mapping[str, Source],
    after: frozenset[str],
    groups: _Groups,
) -> Iterator[LocalTask]:
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
        yield LocalTask(
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


def _ungrouped(task: LocalTask, groups: _Groups) -> LocalTask:
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


def _in_order(tasks: Iterable[LocalTask]) -> Iterator[LocalTask]:
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


@dataclass(frozen=True)
class Call:
    """What a container is started with.

    Attributes:
        command: all placeholders filled in.
        message: Kubeflow's ExecutorInput as a dictionary; `proto` as a message.
    """

    command: list[str]
    environment: dict[str, str]
    message: dict[str, Any]
    proto: Any


def call_of(task: LocalTask, arguments: Mapping[str, Any], run: Path) -> Call:
    """Fill in a task's ExecutorInput and command.

    Args:
        arguments: input name -> parameter value, or kfp artifact; optional inputs may be missing.
        run: the run's folder: the stage's output becomes `RUN/TASK`, its training state `RUN/.TASK.state`,
            all other outputs lie in `RUN/kubeflow/TASK`.

    Raises:
        InputError: the package uses Kubeflow's workspace.
    """
    from kfp.local import executor_input_utils, placeholder_utils

    proto = executor_input_utils.construct_executor_input(
        component_spec=task.component,
        arguments=dict(arguments),
        task_root=str(run / KUBEFLOW / task.name),
        block_input_artifact=False,
    )
    if task.stage and OUT in proto.outputs.artifacts:
        # Where `dvc repro` has it, too: all that reads the folder of a run finds its stages.
        proto.outputs.artifacts[OUT].artifacts[0].uri = str(run / task.name)
    message = executor_input_utils.executor_input_to_dict(proto, task.component)
    inputs = message.get("inputs", {})
    # As on a cluster: what has no value is not there.
    known = {key: value for key, value in inputs.get("parameterValues", {}).items() if value is not None}
    if inputs:
        inputs["parameterValues"] = known
    try:
        command = placeholder_utils.replace_placeholders(
            full_command=task.words,
            executor_input_dict=message,
            pipeline_resource_name=run.name,
            task_resource_name=task.name,
            pipeline_root=str(run),
            unique_pipeline_id=run.name,
        )
    except RuntimeError as error:  # of kfp: no workspace is configured
        raise InputError(
            f"The task '{task.name}' uses Kubeflow's workspace, which there is none of here",
            where=run,
            fix="submit the package to an endpoint, or choose an --out without '/kfp-workspace' in its path",
        ) from error
    environment = {item.name: item.value for item in task.executor.container.env}
    environment.pop(STATES_VARIABLE, None)  # a cluster's volume, as the option that names one
    if task.stage:
        command = _with_state(command, run / f".{task.name}.state")
    return Call(command, environment, message, proto)


def _with_state(command: list[str], state: Path) -> list[str]:
    """The command with the folder of its training states: a cluster's volume is not here."""
    if STATE_OPTION in command[:-1]:
        place = command.index(STATE_OPTION) + 1
        return [*command[:place], str(state), *command[place + 1 :]]
    return [*command, STATE_OPTION, str(state)]


def outputs_of(task: LocalTask, call: Call) -> dict[str, Any]:
    """Output name -> parameter value or kfp artifact, as the container has written them.

    Raises:
        ValueError: what it wrote is not Kubeflow's ExecutorOutput.
    """
    from google.protobuf import json_format
    from kfp.local import executor_output_utils

    try:
        written = executor_output_utils.load_executor_output(call.message["outputs"]["outputFile"])
        found: dict[str, Any] = executor_output_utils.get_outputs_from_executor_output(
            executor_output=written, executor_input=call.proto, component_spec=task.component
        )
    except (json_format.ParseError, OSError, KeyError) as error:
        raise ValueError(f"{EXECUTOR_OUTPUT} cannot be read ({error})") from error
    return found


def imported(task: LocalTask, value_of: Callable[[Source], Any]) -> dict[str, Any]:
    """The output of an importer: the artifact of the given address."""
    from google.protobuf import json_format
    from kfp.local import importer_handler

    importer = task.executor.importer
    given = task.parameters.get("uri")
    address = importer.artifact_uri.constant.string_value if given is None else value_of(given)
    kind = importer_handler.get_artifact_class_from_schema_title(importer.type_schema.schema_title)
    metadata = json_format.MessageToDict(importer.metadata)
    return {"artifact": kind(name="artifact", uri=str(address), metadata=metadata)}


def imported_places(tasks: Iterable[LocalTask], parameters: Mapping[str, Any]) -> list[Path]:
    """Files and folders of this machine that importers name; containers need them mounted.

    Args:
        parameters: values of the pipeline's parameters.
    """

    def value_of(source: Source) -> Any:
        return parameters.get(source.value) if source.kind == "parameter" else source.value

    addresses = [imported(task, value_of)["artifact"].uri for task in tasks if task.is_importer]
    places = [Path(address.removeprefix("file://")) for address in addresses]
    return [place for place in places if place.is_absolute() and place.exists()]
