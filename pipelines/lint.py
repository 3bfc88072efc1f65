"""Rules that a compiled package must keep to work on a cluster, read from the package itself.

`vitpipe compile` applies them to what it has written, so that a change of kfp or of a placement cannot break
a promise without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.safe_yaml import SAFE_LOADER

_MAX_PARAMETER = 10_000  # characters; Kubeflow refuses more
_SECRET_NAMES = ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY")


def check_package_rules(path: Path) -> None:
    """Apply every rule to a compiled package.

    Raises:
        InputError: names all that are broken.
    """
    documents = [document for document in yaml.load_all(read_text(path), Loader=SAFE_LOADER) if document]
    if found := list(broken_rules(documents)):
        raise InputError(
            f"The package breaks rules of a cluster: {'; '.join(found)}",
            where=path,
            fix="correct the placement, or report this with the placement and the recipe",
        )


def broken_rules(documents: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with a package, in words.

    Args:
        documents: PipelineSpec and PlatformSpec as plain values.
    """
    spec, platform = documents
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, task, component in leaf_tasks(spec):
        label = component["executorLabel"]
        executor = spec["deploymentSpec"]["executors"][label]
        if "importer" in executor:
            continue  # Kubeflow's own pod fetches an artifact
        container = executor["container"]
        config = placed.get(label, {})
        for rule in (_retries, _limits, _gpus, _memory, _secrets, _parameters):
            yield from (f"task {name}: {found}" for found in rule(task, container, config))


def leaf_tasks(spec: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, task and component of all that is run, also within groups such as that of an exit handler.

    Args:
        spec: PipelineSpec as plain values.
    """
    waiting = [spec["root"]["dag"]]
    while waiting:
        for name, task in waiting.pop()["tasks"].items():
            component = spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                waiting.append(component["dag"])
            else:
                yield name, task, component


_Value = Mapping[str, Any]


def _retries(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    """kfp's backoffMaxDuration is the whole time in which a task may be retried."""
    policy = task.get("retryPolicy")
    if not policy or not policy.get("maxRetryCount"):
        return
    timeout = int(config.get("activeDeadlineSeconds", 0))
    window = float(str(policy.get("backoffMaxDuration", "0s")).removesuffix("s"))
    if window < (policy["maxRetryCount"] + 1) * timeout:
        yield (
            f"{policy['maxRetryCount']} retries of {timeout} s do not fit into the {window:g} s in which "
            "Kubeflow retries"
        )


def _limits(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    if not int(config.get("activeDeadlineSeconds", 0)):
        yield "it has no time limit"
    resources = container.get("resources", {})
    if "resourceMemoryLimit" not in resources:
        yield "it has no memory limit"
    if "resourceCpuRequest" not in resources:
        yield "it requests no cores"


def _gpus(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    """kfp writes the accelerator's type verbatim as the name of a resource."""
    accelerator = container.get("resources", {}).get("accelerator")
    if accelerator is not None and "/" not in accelerator["resourceType"]:
        yield f"'{accelerator['resourceType']}' is no resource of a node, such as nvidia.com/gpu"


def _memory(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    """Loader processes die of a bus error with the 64 MB that pods have."""
    mounts = config.get("emptyDirMounts", ())
    if not any(mount["mountPath"] == "/dev/shm" and mount.get("medium") == "Memory" for mount in mounts):
        yield "nothing is mounted at /dev/shm"


def _secrets(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    """Packages are stored and shown in plain text."""
    for variable in container.get("env", ()):
        name, value = variable["name"], str(variable.get("value", ""))
        if any(word in name.upper() for word in _SECRET_NAMES) or hidden(value) != value:
            yield f"the variable {name} holds a secret in plain text"


def _parameters(task: _Value, container: _Value, config: _Value) -> Iterator[str]:
    for key, value in task["inputs"].get("parameters", {}).items():
        constant = value.get("runtimeValue", {}).get("constant")
        if isinstance(constant, str) and len(constant) > _MAX_PARAMETER:
            yield f"parameter {key} has {len(constant):,} characters, Kubeflow allows {_MAX_PARAMETER:,}"
