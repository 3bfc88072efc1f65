"""What the containers of a compiled package are started with on this machine: inputs, messages, commands.

The messages are Kubeflow's own, filled in by kfp's functions, so a container sees what it sees on a cluster.
kfp's own local runner is not used: it starts nothing after a failed task, not even what shall run then, and
reports some failed containers as succeeded (kubeflow/pipelines#13332).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.package_tasks import PackageTask, Source
from vitpipe.contracts.errors import InputError
from vitpipe.stages.executor import OUT
from vitpipe.stages.state_folder import STATES_VARIABLE

EXECUTOR_OUTPUT = "executor_output.json"
KUBEFLOW = "kubeflow"  # folder of a run: what Kubeflow's launcher reads and writes, by task
STATE_OPTION = "--state"


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


def call_of(task: PackageTask, arguments: Mapping[str, Any], run: Path) -> Call:
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
    if task.is_ours and OUT in proto.outputs.artifacts:
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


def outputs_of(task: PackageTask, call: Call) -> dict[str, Any]:
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


def imported(task: PackageTask, value_of: Callable[[Source], Any]) -> dict[str, Any]:
    """The output of an importer: the artifact of the given address."""
    from google.protobuf import json_format
    from kfp.local import importer_handler

    importer = task.executor.importer
    given = task.parameters.get("uri")
    address = importer.artifact_uri.constant.string_value if given is None else value_of(given)
    kind = importer_handler.get_artifact_class_from_schema_title(importer.type_schema.schema_title)
    metadata = json_format.MessageToDict(importer.metadata)
    return {"artifact": kind(name="artifact", uri=str(address), metadata=metadata)}


def imported_places(tasks: Iterable[PackageTask], parameters: Mapping[str, Any]) -> list[Path]:
    """Files and folders of this machine that importers name; containers need them mounted.

    Args:
        parameters: values of the pipeline's parameters.
    """

    def value_of(source: Source) -> Any:
        return parameters.get(source.value) if source.kind == "parameter" else source.value

    addresses = [imported(task, value_of)["artifact"].uri for task in tasks if task.is_importer]
    places = [Path(address.removeprefix("file://")) for address in addresses]
    return [place for place in places if place.is_absolute() and place.exists()]
