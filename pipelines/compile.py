"""Write a recipe's pipeline as a package, and read any package back strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipelines.placement import Placement
from vitpipe.config.read import load_recipe
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.files import written_aside
from vitpipe.contracts.graph import BY_NAME, Image

_MEND = "compile it again: vitpipe compile --out FILE"
# User and password of an address, whatever characters the password has.
_CREDENTIALS = re.compile(r"://[^/?#]*:[^/?#]*@")


@dataclass(frozen=True)
class Task:
    """One task of a package: `inputs` maps input name -> feeding stage, `command` has the arguments too."""

    stage: str
    image: str
    command: tuple[str, ...]
    inputs: dict[str, str]


@dataclass(frozen=True)
class Package:
    """A compiled pipeline that passed the strict reading. Tasks stand in running order."""

    path: Path
    name: str
    tasks: tuple[Task, ...]
    parameters: dict[str, Any]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in running order."""
        return tuple(task.stage for task in self.tasks)

    @property
    def images_without_digest(self) -> tuple[str, ...]:
        """Images that are named by a tag: whoever moves the tag changes results behind the cache's back."""
        return tuple(sorted({task.image for task in self.tasks if "@sha256:" not in task.image}))


def default_images() -> dict[Image, str]:
    """The project's images at the installed version."""
    tag = version("vitpipe")
    return {"train": f"vitpipe-train:{tag}", "dense": f"vitpipe-dense:{tag}"}


def compile_pipeline(
    recipe: str,
    profile: str,
    overrides: Sequence[str],
    out: Path,
    *,
    images: Mapping[Image, str] | None = None,
    placement: Placement | None = None,
) -> Package:
    """Compile the pipeline of one recipe into `out`, which appears when it has passed the strict reading.

    Args:
        recipe: name of a recipe.
        profile: name of a profile.
        overrides: `section.key=value`; they decide the graph (`stages=...`) and become parameters.
        out: file ending in .yaml.
        images: image reference for `train` and `dense`; those left out are the project's own.
        placement: a cluster's labels and volumes; none by default.

    Raises:
        RecipeError: the recipe cannot be read.
        InputError: `out` does not end in .yaml, or a value cannot stand in a package (`check_texts`).
    """
    chosen = load_recipe(recipe, profile, overrides)
    check_texts((recipe, profile, *overrides), "recipe, profile and overrides")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError("A pipeline package ends in .yaml", where=out, fix="choose another --out name")
    _refuse_foreign_file(out)

    from kfp import compiler

    from pipelines.reproduce import reproduce

    pipeline = reproduce(chosen, overrides, {**default_images(), **(images or {})}, placement or Placement())
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as partial:
        compiler.Compiler().compile(pipeline, str(partial))
        validate_package(partial)
    return validate_package(out)


def _refuse_foreign_file(out: Path) -> None:
    """A package takes the place of a package only: params.yaml and recipes end in .yaml, too."""
    if not out.exists() and not out.is_symlink():
        return
    text = out.read_text(encoding="utf-8", errors="replace") if out.is_file() else ""
    if not out.is_file() or (text.strip() and "pipelineInfo:" not in text):
        raise InputError(
            "The file to write is there already and is no pipeline package; nothing was touched",
            where=out,
            fix="choose another --out name",
        )


def validate_package(path: Path) -> Package:
    """Read a package with the protocol's own message types: unknown or mistyped fields are refused.

    Beyond the types: every executor exists, every task runs `vitpipe run` with the stage of its name, and
    every input comes from a task that is there.

    Raises:
        InputError: when the file is not such a package; all findings at once.
    """
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2
    from kfp.pipeline_spec import pipeline_spec_pb2

    with _strictly(path, json_format.ParseError):
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        deployment = json_format.ParseDict(
            documents[0]["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
        )
        placed: dict[str, Any] = {}
        for document in documents[1:]:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
            placed |= document["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for config in placed.values():
            json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    executors = {label: executor.container for label, executor in deployment.executors.items()}
    found = [f"there are settings for '{label}', which is no executor" for label in placed.keys() - executors]
    tasks = []
    for name, task in spec.root.dag.tasks.items():
        label = spec.components[task.component_ref.name].executor_label
        if label not in executors:
            found.append(f"the executor '{label}' of task '{name}' does not exist")
            continue
        command = (*executors[label].command, *executors[label].args)
        feeders = {k: v.task_output_artifact.producer_task for k, v in task.inputs.artifacts.items()}
        tasks.append(Task(name, executors[label].image, command, feeders))
    found += [problem for task in tasks for problem in _problems(task, {t.stage for t in tasks})]
    if found or not tasks:
        what = "; ".join(found) or "it has no tasks"
        raise InputError(f"The pipeline package is wrong: {what}", where=path, fix=_MEND)
    parameters = {
        name: json_format.MessageToDict(definition.default_value)
        for name, definition in spec.root.input_definitions.parameters.items()
    }
    tasks.sort(key=lambda task: list(BY_NAME).index(task.stage))
    return Package(path, spec.pipeline_info.name, tuple(tasks), parameters)


def check_arguments(package: Package, arguments: Mapping[str, Any]) -> None:
    """Refuse parameters that the package does not have, and values that cannot be one (`check_texts`).

    Raises:
        InputError: names them all.
    """
    check_texts(_texts_in(list(arguments.values())), "--argument")
    unknown = sorted(set(arguments) - set(package.parameters))
    if unknown:
        raise InputError(
            f"The pipeline has no parameter {', '.join(map(repr, unknown))}",
            where=package.path,
            fix=f"its parameters are {', '.join(sorted(package.parameters))}",
        )


def check_texts(texts: Iterable[str], where: str) -> None:
    """Refuse what other programs would change, or other people read, in a package or a run's parameters.

    Every parameter becomes an argument of a container. No shell reads it, but Kubernetes replaces `$(NAME)`
    there by environment variables, and Kubeflow and Argo replace what stands between double braces.

    Raises:
        InputError: names the first such text.
    """
    for text in texts:
        if hidden(text) != text or _CREDENTIALS.search(text):
            name, equals, _ = text.partition("://")[0].partition("=")
            subject = f"The address of {name}" if equals else "An address"
            raise InputError(
                f"{subject} holds credentials, which others could read in the package and in Kubeflow",
                where=where,
                fix="leave them out of the address; in a pod git finds them by a credential helper in its "
                "configuration, which may be a mounted secret that GIT_CONFIG_GLOBAL names, and S3 by "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a role",
            )
        for found, program in (("$(", "Kubernetes"), ("{{", "Kubeflow"), ("}}", "Kubeflow")):
            if found in text:
                raise InputError(
                    f"'{text}' holds {found}, which {program} would replace by something else",
                    where=where,
                    fix="write the value without it",
                )


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _problems(task: Task, present: set[str]) -> Iterator[str]:
    if task.stage not in BY_NAME:
        yield f"there is no stage '{task.stage}'"
    if task.command[:3] != ("vitpipe", "run", task.stage) or "{{$}}" not in task.command:
        yield f"task '{task.stage}' does not run `vitpipe run {task.stage}` with an executor input"
    if not task.image:
        yield f"task '{task.stage}' names no image"
    for name, feeder in task.inputs.items():
        if feeder not in present:
            yield f"input '{name}' of task '{task.stage}' comes from '{feeder}', which is not there"


@contextmanager
def _strictly(path: Path, parse_error: type[Exception]) -> Iterator[None]:
    """Whatever a broken file provokes becomes one InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The pipeline package cannot be read ({error.strerror})", where=path, fix=_MEND
        ) from error
    except (parse_error, yaml.YAMLError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"The file is not a Kubeflow pipeline package ({first})", where=path, fix=_MEND
        ) from error
