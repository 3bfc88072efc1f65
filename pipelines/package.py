"""A compiled package: strict reading, and the checks of what a run is given with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.findings import Finding
from pipelines.package_tasks import PackageTask, flat_tasks
from vitpipe.config.carried import recipe_from
from vitpipe.config.pipeline_parameters import (
    FIXED_OVERRIDES,
    OVERRIDES,
    check_run_wide,
    check_section,
    stage_of_parameter,
)
from vitpipe.config.read import recipe_values
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import all_stages
from vitpipe.contracts.safe_yaml import SAFE_LOADER
from vitpipe.stages.pipeline_run import CHECK, COMPARISON, CONCLUSION

_RECOMPILE = "compile it again: vitpipe compile --out FILE"
# User and password of an address. The password may hold any character but the three that end the authority
# part of a URL (RFC 3986, section 3.2).
_CREDENTIALS = re.compile(r"://[^/?#]*:[^/?#]*@")

# kfp numbers the tasks of one component: pretrain, pretrain-2, pretrain-3.
_NUMBER = re.compile(r"-\d+$")


@dataclass(frozen=True)
class Task:
    """One task of a package: `inputs` maps input name -> upstream task, `command` includes the arguments.

    Attributes:
        name: the stage's, with `-2`, `-3`, ... where a table's package runs the stage several times.
        constants: parameters that the package has fixed.
        parameters: the other ones: the task's name of it -> the pipeline's.
    """

    name: str
    stage: str
    image: str
    command: tuple[str, ...]
    inputs: dict[str, str]
    constants: dict[str, Any]
    parameters: dict[str, str]

    @property
    def runs_no_stage(self) -> bool:
        """Whether it checks the cluster before the stages, or reports on what they have left behind them."""
        verbs = ((CHECK,), (CONCLUSION,), (COMPARISON,))
        return self.command[:1] == ("vitpipe",) and self.command[1:2] in verbs

    @property
    def is_launched(self) -> bool:
        """Whether the task launches a job on several nodes."""
        return self.command[:2] == ("vitpipe", "launch")

    def overrides(self, given: Mapping[str, Any]) -> list[str]:
        """The overrides that the task gets of these values of the pipeline's parameters."""
        lists = [given.get(self.parameters.get(name, ""), []) for name in self.parameters]
        own = [text for texts in lists if isinstance(texts, list) for text in texts]
        return [*self.constants.get(FIXED_OVERRIDES, []), *own]


@dataclass(frozen=True)
class Package:
    """A compiled pipeline that passed `validate_package`.

    Attributes:
        tasks: those that run stages, in running order; checks and the report of a failure are not among them.
        parameters: of the pipeline, with their defaults.
        findings: what would spoil its run on a cluster, where it has just been compiled.
    """

    path: Path
    name: str
    tasks: tuple[Task, ...]
    parameters: dict[str, Any]
    findings: tuple[Finding, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in running order."""
        return tuple(task.stage for task in self.tasks)


def validate_package(path: Path) -> Package:
    """Parse a package with Kubeflow's protobuf messages: unknown or mistyped fields are refused.

    Beyond the types: every executor exists, every task runs `vitpipe run` with the stage of its name, and
    every input comes from a task of the package.

    Raises:
        InputError: when the file is not such a package; names all findings at once.
    """
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2
    from kfp.pipeline_spec import pipeline_spec_pb2

    with _parse_errors(path, json_format.ParseError):
        # The first document is the pipeline; the second, if any, is what kfp-kubernetes adds (PlatformSpec).
        documents = [d for d in yaml.load_all(read_text(path), Loader=SAFE_LOADER) if d is not None]
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        # PipelineSpec declares deploymentSpec as a free-form Struct, so its fields are checked by a message
        # of their own; the same holds for the executors of PlatformSpec.
        deployment = json_format.ParseDict(
            documents[0]["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
        )
        placed: dict[str, Any] = {}
        for document in documents[1:]:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
            placed |= document["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for config in placed.values():
            json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    labels = set(deployment.executors)
    found = [
        f"there are settings for '{label}', which is not an executor"
        for label in placed
        if label not in labels
    ]
    found += [
        f"the executor '{component.executor_label}' of task '{name.removeprefix('comp-')}' does not exist"
        for name, component in spec.components.items()
        if component.executor_label and component.executor_label not in labels
    ]
    tasks: list[Task] = []
    if not found:
        flat = flat_tasks(path, spec, deployment)
        present = {task.name for task in flat}
        tasks = [_task(task) for task in flat if not task.is_importer]
        found += [problem for task in tasks for problem in _problems(task, present)]
    if found or not tasks:
        what = "; ".join(found) or "it has no tasks"
        raise InputError(f"The pipeline package is invalid: {what}", where=path, fix=_RECOMPILE)
    parameters = {
        name: json_format.MessageToDict(definition.default_value)
        for name, definition in spec.root.input_definitions.parameters.items()
    }
    # A protobuf map has no order: the graph's order is a valid running order of every recipe.
    tasks = [task for task in tasks if not task.runs_no_stage]
    tasks.sort(key=lambda task: (list(all_stages()).index(task.stage), len(task.name), task.name))
    return Package(path, spec.pipeline_info.name, tuple(tasks), parameters)


def _task(task: PackageTask) -> Task:
    return Task(
        task.name,
        stage=_NUMBER.sub("", task.name),
        image=task.image,
        command=tuple(task.words),
        inputs={key: source.task for key, source in task.artifacts.items()},
        constants={key: source.value for key, source in task.parameters.items() if source.kind == "constant"},
        parameters={
            key: source.value for key, source in task.parameters.items() if source.kind == "parameter"
        },
    )


def check_arguments(package: Package, arguments: Mapping[str, Any]) -> None:
    """Refuse parameters that the package does not have, and values that a task would refuse hours later.

    Raises:
        InputError: names all unknown parameters, or the first value that `check_texts` refuses.
        RecipeError: an override is none of the recipe of a task, or changes what the package has fixed.
    """
    check_texts(_texts_in(list(arguments.values())), "--argument")
    unknown = sorted(set(arguments) - set(package.parameters))
    if unknown:
        raise InputError(
            f"The pipeline has no parameter {', '.join(map(repr, unknown))}",
            where=package.path,
            fix=f"use one of its parameters: {', '.join(sorted(package.parameters))}",
        )
    for name, default in package.parameters.items():
        if isinstance(default, list):
            _check_list(name, arguments.get(name, default))
    check_run_wide(package.parameters, arguments.get(OVERRIDES, []))
    for name, value in arguments.items():
        if stage_of_parameter(name):
            check_section(name, value)
    values = {**package.parameters, **arguments}
    for task in package.tasks:
        given = task.constants
        # Not there in a package of an earlier version.
        if carried := given.get("recipe_values"):
            recipe_from(given["recipe"], given["profile"], carried, task.overrides(values))


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, list) or any(not isinstance(text, str) for text in value):
        example = f"{stage_of_parameter(name) or 'data'}.key=value"
        raise InputError(
            f"'{name}' has no value" if value is None else f"'{name}' is not a list of texts",
            where="--argument",
            fix=f"write for example --argument '{name}=[{example}]'",
        )


def check_texts(texts: Iterable[str], where: str) -> None:
    """Refuse credentials and placeholder syntax in the texts of a package or of a run's parameters.

    Args:
        where: where the texts come from, for the message.

    Raises:
        InputError: names the first such text.
    """
    for text in texts:
        _refuse_credentials(text, where)
        # Every parameter becomes an argument of a container. No shell reads it, but Kubernetes expands
        # $(NAME) in arguments to environment variables, and Kubeflow and Argo replace text between double
        # braces.
        for found, program in (("$(", "Kubernetes"), ("{{", "Kubeflow"), ("}}", "Kubeflow")):
            if found in text:
                raise InputError(
                    f"'{text}' contains {found}, which {program} would replace",
                    where=where,
                    fix=f"write the value without {found}",
                )


def check_carried_texts(recipe: str, profile: str) -> None:
    """Refuse credentials in a recipe's own values, which a package carries; what it carries is not replaced.

    Raises:
        InputError: as `check_texts`.
    """
    for text in _texts_in(recipe_values(recipe, profile)):
        _refuse_credentials(text, f"recipe {recipe}")


def _refuse_credentials(text: str, where: str) -> None:
    # Kubeflow stores packages and parameters in plain text and shows them on its pages.
    if hidden(text) != text or _CREDENTIALS.search(text):
        # Only the key is named: the message must not repeat the password.
        name, equals, _ = text.partition("://")[0].partition("=")
        subject = f"The address of {name}" if equals else "An address"
        raise InputError(
            f"{subject} contains credentials, which others could read in the package and in Kubeflow",
            where=where,
            fix="remove them from the address; in a pod, give git a credential helper in a configuration "
            "file (a mounted secret named by GIT_CONFIG_GLOBAL), and S3 the variables AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY or a role",
        )


def _texts_in(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _problems(task: Task, present: set[str]) -> Iterator[str]:
    if task.stage not in all_stages() and not task.runs_no_stage:
        yield f"there is no stage '{task.stage}'"
    # "{{$}}" is KFP's placeholder of the executor input. Without it a container cannot write its receipt.
    verbs = [("vitpipe", verb, task.stage) for verb in ("run", "launch")]
    if (task.command[:3] not in verbs and not task.runs_no_stage) or "{{$}}" not in task.command:
        yield f"task '{task.name}' does not run `vitpipe run {task.stage}` with the executor input {{{{$}}}}"
    if not task.image:
        yield f"task '{task.name}' has no image"
    for name, feeder in task.inputs.items():
        if feeder not in present:
            yield f"input '{name}' of task '{task.name}' comes from '{feeder}', which is not a task"


@contextmanager
def _parse_errors(path: Path, parse_error: type[Exception]) -> Iterator[None]:
    """Turn every error that a malformed file can cause into one InputError."""
    # `parse_error` is a parameter, because protobuf is imported late, like kfp.
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The pipeline package cannot be read ({error.strerror})", where=path, fix=_RECOMPILE
        ) from error
    # KeyError to TypeError: YAML that is no mapping, or lacks a section that is read above.
    except (parse_error, yaml.YAMLError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"The file is no Kubeflow pipeline package, or a part of one ({first})",
            where=path,
            fix=_RECOMPILE,
        ) from error
