"""Run a compiled package on this machine: kfp's Docker runner, made truthful.

The runner reports some failed containers as succeeded and loses what they said, because it lets the daemon
remove a container before it asks how it ended; it deletes the workspace folder that it is given; and it lets
the daemon make missing folders as root. So containers are run and removed here, every stage must leave a
receipt, the workspace is a scratch folder of our own, and the run's folder is made first.

Development mode needs no built image: the checkout and the Python environment of this process are mounted
read-only, at their own paths, into a plain Debian image (docker/dev-image.sh makes it).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from pipelines.compile import Package, check_arguments, validate_package
from vitpipe.config.digest import file_digest
from vitpipe.contracts.artifact import CARD, open_artifact
from vitpipe.contracts.errors import ArtifactError, EngineError, InputError, disk_errors
from vitpipe.stages.executor import OUT, RECEIPT

DEV_IMAGE = "vitpipe-dev:latest"
CHECKOUT = Path(__file__).resolve().parent.parent
_WITHOUT_DOCKER = "start Docker, or run the same graph without it: dvc repro"
_PASSED_ON = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "VITPIPE_TRACKING")
_NUM_LOG_LINES = 12
_EXIT_MEANS = {
    126: "the command cannot be executed in this image",
    127: "the image holds no `vitpipe`",
    135: "a bus error, usually too little shared memory: give more with --shm-gib",
    137: "killed from outside, usually out of memory",
}


@dataclass(frozen=True)
class LocalRun:
    """A finished local run: its folder and each stage's output folder."""

    folder: Path
    outputs: dict[str, Path]


def run_locally(
    package_path: Path,
    *,
    root: Path,
    arguments: Mapping[str, Any] | None = None,
    data: Path | None = None,
    shm_gib: int = 2,
    development: bool = False,
) -> LocalRun:
    """Run every stage of a package in its container, one after the other.

    Args:
        package_path: a compiled package.
        root: folder for runs; each gets a folder of its own, with one log per stage in `logs`.
        arguments: pipeline parameters.
        data: raw datasets, mounted read-only at the same path.
        shm_gib: size of /dev/shm, GiB.
        development: mount this checkout and environment instead of trusting the image to hold them.

    Raises:
        InputError: the package, a parameter or the data folder is wrong.
        EngineError: no Docker engine, a missing image, or a stage that failed or left no receipt.
    """
    package = validate_package(package_path)
    check_arguments(package, arguments or {})
    if data is not None and not data.is_dir():
        raise InputError("The data folder does not exist", where=data, fix="give that of the raw datasets")
    with _engine(package) as engine_error:
        folder = root.resolve() / f"{package.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        containers = Containers(folder / "logs")
        with disk_errors(root):
            (folder / "logs").mkdir(parents=True)
        failure = None
        try:
            settings = _container_settings(folder, data, shm_gib, development)
            _run(package, folder, dict(arguments or {}), settings, containers)
        except (RuntimeError, ValueError, engine_error) as error:
            failure = error
    return LocalRun(folder, _demand_receipts(package, folder, containers, failure))


class Containers:
    """Runs containers in the runner's place: their exit codes and their logs are kept.

    Args:
        logs: folder for one log per stage.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.exit_codes: dict[str, int | None] = {}

    def run(
        self, client: Any, image: str, command: list[str], volumes: dict[str, Any], **settings: Any
    ) -> int:
        """Run one container to its end and remove it, also when this process is interrupted.

        Args:
            client: docker client.
            command: `vitpipe run STAGE ...`.
            volumes: as the docker client takes them.
            settings: further arguments of `docker run`.

        Returns:
            The exit code.
        """
        stage = command[2]
        self.exit_codes[stage] = None
        container = client.containers.run(image, command, volumes=volumes, detach=True, **settings)
        try:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            with self.log(stage).open("w", encoding="utf-8", buffering=1) as log:
                for piece in container.logs(stream=True, follow=True):
                    text = decoder.decode(piece)
                    log.write(text)
                    sys.stderr.write(text)
            code = int(container.wait()["StatusCode"])
            self.exit_codes[stage] = code
            return code
        finally:
            container.remove(force=True)

    def log(self, stage: str) -> Path:
        """Where a stage's output is kept."""
        return self.logs / f"{stage}.log"

    def last_lines(self, stage: str) -> str:
        """The last lines that a stage's container printed, as one line."""
        if not self.log(stage).is_file():
            return ""
        lines = self.log(stage).read_text(encoding="utf-8").splitlines()
        return " | ".join(deque((line.strip() for line in lines if line.strip()), maxlen=_NUM_LOG_LINES))


def _run(
    package: Package,
    folder: Path,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    containers: Containers,
) -> None:
    from kfp import components, local
    from kfp.local import docker_task_handler

    with (
        tempfile.TemporaryDirectory(prefix="vitpipe-scratch-") as scratch,
        (containers.logs / "runner.log").open("w", encoding="utf-8") as chatter,
        contextlib.redirect_stdout(chatter),
        warnings.catch_warnings(),
        mock.patch.object(docker_task_handler, "run_docker_container", containers.run),
    ):
        warnings.simplefilter("ignore")  # one per request and limit: they have no effect here
        workspace = Path(scratch) / "workspace"
        workspace.mkdir()
        local.init(local.DockerRunner(**settings), pipeline_root=str(folder), workspace_root=str(workspace))
        components.load_component_from_text(_without_retries(package.path))(**arguments)


def _without_retries(path: Path) -> str:
    """The package's text without retries: they are for nodes that vanish and would only delay an error."""
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for task in documents[0]["root"]["dag"]["tasks"].values():
        task.pop("retryPolicy", None)
    return yaml.safe_dump_all(documents)


def _container_settings(folder: Path, data: Path | None, shm_gib: int, development: bool) -> dict[str, Any]:
    """Arguments of every `docker run`."""
    from docker.types import Mount

    read_only = [data.resolve()] if data is not None else []
    environment = {
        "HOME": "/tmp",
        "USER": "vitpipe",  # a uid without a name makes getpass fail, and libraries with it
        "PYTHONUNBUFFERED": "1",
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }
    if development:
        own = (CHECKOUT, Path(sys.prefix), Path(sys.base_prefix))
        read_only += [path for path in dict.fromkeys(own) if path not in read_only]
        environment["PATH"] = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        environment["PYTHONPATH"] = str(CHECKOUT)
    settings: dict[str, Any] = {
        "user": f"{os.getuid()}:{os.getgid()}",
        "shm_size": f"{shm_gib}g",
        "mounts": [Mount(str(path), str(path), type="bind", read_only=True) for path in read_only],
        "environment": environment,
        "working_dir": str(folder),  # the sqlite store of MLflow appears in the working folder
        "init": True,  # hands SIGTERM on and reaps data workers
    }
    if environment.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        settings["network_mode"] = "host"  # the server may be one on this machine
    return settings


@contextlib.contextmanager
def _engine(package: Package) -> Iterator[type[Exception]]:
    """See that Docker answers and that every image is there or can be had; yields its error class."""
    try:
        import docker
    except ImportError as error:
        raise EngineError(
            "The Docker client for Python is not installed", fix="install the extra: vitpipe[kubeflow]"
        ) from error
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise EngineError("No Docker engine answers", where="docker", fix=_WITHOUT_DOCKER) from error
    with contextlib.closing(client):
        for image in sorted({task.image for task in package.tasks}):
            _find_image(client, image)
    yield docker.errors.DockerException


def _find_image(client: Any, image: str) -> None:
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        fix = "docker/dev-image.sh makes it" if image == DEV_IMAGE else "build it or name another"
        try:
            client.images.pull(image)
        except docker.errors.DockerException as error:
            raise EngineError(
                f"The image {image} is neither here nor can it be pulled", where="docker", fix=fix
            ) from error


def _demand_receipts(
    package: Package, folder: Path, containers: Containers, failure: BaseException | None
) -> dict[str, Path]:
    """Each stage's output folder.

    Raises:
        EngineError: a stage left no valid receipt; names the first one that was started, with its last lines.
    """
    outputs: dict[str, Path] = {}
    never_started = [stage for stage in package.stages if stage not in containers.exit_codes]
    for stage in (*containers.exit_codes, *never_started):
        task_folder = next(iter(folder.glob(f"{package.name}-*/{stage}")), folder / stage)
        problem = _receipt_problem(task_folder, stage)
        if problem:
            code = containers.exit_codes.get(stage)
            known = f", {_EXIT_MEANS[code]}" if code in _EXIT_MEANS else ""
            ended = f" (exit code {code}{known})" if code else ""
            said = containers.last_lines(stage) or (str(failure) if failure else "")
            raise EngineError(
                f"Stage '{stage}' {problem}{ended}" + (f". It said: {said}" if said else ""),
                where=containers.log(stage),
                fix="fix the cause and run again; `dvc repro` runs the same stages without Docker",
            ) from failure
        outputs[stage] = task_folder / OUT
    if failure is not None:
        raise EngineError(
            f"All stages are complete, but the runner failed: {failure}", where=folder, fix="run again"
        ) from failure
    return {stage: outputs[stage] for stage in package.stages}


def _receipt_problem(task_folder: Path, stage: str) -> str:
    try:
        message = json.loads((task_folder / "executor_output.json").read_text(encoding="utf-8"))
        receipt = message["artifacts"][OUT]["artifacts"][0]["metadata"][RECEIPT]
        open_artifact(task_folder / OUT, stage)
        if receipt != file_digest(task_folder / OUT / CARD):
            return "left a receipt that is not of its card"
    except (OSError, ValueError, LookupError, TypeError):
        return "did not come to its end"
    except ArtifactError as error:
        return f"left no finished folder ({error.what})"
    return ""
