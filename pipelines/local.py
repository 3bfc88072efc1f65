"""Run a compiled package on this machine with kfp's Docker runner, and check that every stage finished.

kfp 2.17's runner reports some failed containers as succeeded. So containers are started and removed by this
module, and every stage must leave a receipt: `executor_output.json` with the SHA-256 of its card.

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

from pipelines.package import Package, check_arguments, validate_package
from vitpipe.config.digest import file_digest
from vitpipe.contracts.artifact import CARD, open_artifact
from vitpipe.contracts.discovery import PLUGINS_VARIABLE, plugin_folders
from vitpipe.contracts.errors import ArtifactError, EngineError, InputError, disk_errors
from vitpipe.contracts.files import read_text
from vitpipe.stages.executor import OUT, RECEIPT

DEV_IMAGE = "vitpipe-dev:latest"
CHECKOUT = Path(__file__).resolve().parent.parent
_WITHOUT_DOCKER = "start Docker, or run the same stages without it by `dvc repro`"
# Only what a stage reads itself: the environment of a shell may hold credentials.
_PASSED_ON = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "VITPIPE_TRACKING")
_NUM_LOG_LINES = 12
# 126 and 127 are the codes of POSIX shells and of Docker; above 128 it is 128 + the number of the signal.
_EXIT_MEANS = {
    126: "the command cannot be executed in this image",
    127: "the image does not contain `vitpipe`",
    135: "bus error (SIGBUS), usually too little shared memory: increase --shm-gib",
    137: "killed (SIGKILL), usually out of memory",
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
        shm_gib: size of /dev/shm in each container, GiB.
        development: mount this checkout and environment instead of using those inside the image.

    Raises:
        InputError: the package, a parameter or the data folder is wrong.
        EngineError: no Docker engine, a missing image, or a stage that failed or left no receipt.
    """
    package = validate_package(package_path)
    check_arguments(package, arguments or {})
    if len(set(package.stages)) < len(package.tasks):
        # Containers and their logs are told apart by the stage.
        raise InputError(
            "The package holds several runs, those of a table",
            where=package_path,
            fix="run the table here by `vitpipe table PAPER/NUMBER --run`, or submit the package",
        )
    if data is not None and not data.is_dir():
        raise InputError(
            "The data folder does not exist", where=data, fix="give the folder that holds the raw datasets"
        )
    with _engine(package) as engine_error:
        # The process id keeps two runs of the same second apart.
        folder = root.resolve() / f"{package.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        containers = Containers(folder / "logs")
        # Made before the runner mounts it: the Docker daemon creates a missing folder as root, and a
        # container that runs as this user then fails with "Permission denied".
        with disk_errors(root):
            (folder / "logs").mkdir(parents=True)
        failure = None
        try:
            settings = _container_settings(folder, data, shm_gib, development)
            _run(package, folder, dict(arguments or {}), settings, containers)
        # kfp raises RuntimeError for a failed task and ValueError for a missing output of one. The exit codes
        # and receipts tell more, so they are looked at before this error is reported.
        except (RuntimeError, ValueError, engine_error) as error:
            failure = error
    return LocalRun(folder, _require_receipts(package, folder, containers, failure))


class Containers:
    """Runs containers in place of kfp's `run_docker_container`; keeps their exit codes and logs.

    Args:
        logs: folder for one log per stage.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.exit_codes: dict[str, int | None] = {}

    def run(
        self, client: Any, image: str, command: list[str], volumes: dict[str, Any], **settings: Any
    ) -> int:
        """Run one container until it exits and remove it, also when this process is interrupted.

        Args:
            client: docker client.
            command: `vitpipe run STAGE ...`.
            volumes: as the docker client takes them.
            settings: further arguments of `docker run`.

        Returns:
            The exit code.
        """
        stage = command[2]
        self.exit_codes[stage] = None  # started; a stage that is missing here was never started
        # No auto_remove: kfp 2.17 sets it, and when the daemon removes the container before wait() is called,
        # kfp takes docker's NotFound for exit code 0. Of 40 containers with `exit 3`, 4 were reported as
        # succeeded (kubeflow/pipelines#13332).
        container = client.containers.run(image, command, volumes=volumes, detach=True, **settings)
        try:
            # Docker streams chunks of bytes, which may end inside a multi-byte character.
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
        """File with everything that a stage's container printed."""
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
    from kfp import components, local  # costs 3 s of CPU time, which `vitpipe --help` must not pay
    from kfp.local import docker_task_handler

    with (
        tempfile.TemporaryDirectory(prefix="vitpipe-scratch-") as scratch,
        (containers.logs / "runner.log").open("w", encoding="utf-8") as chatter,
        contextlib.redirect_stdout(chatter),  # kfp prints progress there; our stdout holds results only
        warnings.catch_warnings(),
        # Patched, because DockerRunner(auto_remove=False) is a TypeError: kfp already passes that argument.
        mock.patch.object(docker_task_handler, "run_docker_container", containers.run),
    ):
        warnings.simplefilter("ignore")  # kfp warns once per resource request and limit: no effect locally
        # kfp 2.17 deletes workspace_root at the end of every pipeline, even if the user named it and no task
        # used it. So it gets a folder that holds nothing else.
        workspace = Path(scratch) / "workspace"
        workspace.mkdir()
        local.init(local.DockerRunner(**settings), pipeline_root=str(folder), workspace_root=str(workspace))
        components.load_component_from_text(_without_retries(package.path))(**arguments)


def _without_retries(path: Path) -> str:
    """The package's text without retries, which are for lost nodes: here they would only delay an error."""
    documents = list(yaml.safe_load_all(read_text(path)))
    for task in documents[0]["root"]["dag"]["tasks"].values():
        task.pop("retryPolicy", None)
    return yaml.safe_dump_all(documents)


def _container_settings(folder: Path, data: Path | None, shm_gib: int, development: bool) -> dict[str, Any]:
    """Arguments of every `docker run`."""
    from docker.types import Mount

    read_only = [data.resolve()] if data is not None else []
    environment = {
        "HOME": "/tmp",  # the uid has no home in the image, and caches need a writable one
        "USER": "vitpipe",  # getpass.getuser() fails for a uid without a name, and libraries call it
        "PYTHONUNBUFFERED": "1",  # else the last lines before a crash are lost
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }
    if development:
        own = (CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), *plugin_folders())
        # Without duplicates: outside a virtual environment prefix and base_prefix are the same folder, and
        # Docker refuses two mounts at one place.
        read_only += [path for path in dict.fromkeys(own) if path not in read_only]
        environment["PATH"] = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        environment["PYTHONPATH"] = str(CHECKOUT)
        # A container has no params.yaml, which names them.
        environment[PLUGINS_VARIABLE] = os.pathsep.join(map(str, plugin_folders()))
    settings: dict[str, Any] = {
        "user": f"{os.getuid()}:{os.getgid()}",  # Docker's default is root, which would own the outputs
        "shm_size": f"{shm_gib}g",  # Docker's default of 64 MiB is too small for loader processes
        # Same path inside as outside, so that paths in recipes and error messages hold in both.
        "mounts": [Mount(str(path), str(path), type="bind", read_only=True) for path in read_only],
        "environment": environment,
        "working_dir": str(folder),  # MLflow creates its default sqlite store in the working folder
        "init": True,  # process 1 that forwards SIGTERM and reaps loader processes
    }
    if environment.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        settings["network_mode"] = "host"  # the server may be one on this machine
    return settings


@contextlib.contextmanager
def _engine(package: Package) -> Iterator[type[Exception]]:
    """Check that Docker answers and has or can pull every image; yields Docker's error class."""
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
        # All images before the first stage: a missing one is not found after hours of training.
        for image in sorted({task.image for task in package.tasks}):
            _find_image(client, image)
    yield docker.errors.DockerException


def _find_image(client: Any, image: str) -> None:
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        fix = "run docker/dev-image.sh" if image == DEV_IMAGE else "build it, or choose another with --image"
        try:
            client.images.pull(image)
        except docker.errors.DockerException as error:
            raise EngineError(
                f"The image {image} does not exist locally and cannot be pulled", where="docker", fix=fix
            ) from error


def _require_receipts(
    package: Package, folder: Path, containers: Containers, failure: BaseException | None
) -> dict[str, Path]:
    """Each stage's output folder.

    Raises:
        EngineError: a stage left no valid receipt; names the first one started, with its last lines.
    """
    outputs: dict[str, Path] = {}
    # Started stages first: after a failure kfp starts no further task, and those are not the cause.
    never_started = [stage for stage in package.stages if stage not in containers.exit_codes]
    for stage in (*containers.exit_codes, *never_started):
        # kfp puts outputs into PIPELINE_ROOT/PIPELINE-TIMESTAMP/TASK/OUTPUT.
        task_folder = next(iter(folder.glob(f"{package.name}-*/{stage}")), folder / stage)
        problem = _receipt_problem(task_folder, stage)
        if problem:
            code = containers.exit_codes.get(stage)
            known = f", {_EXIT_MEANS[code]}" if code in _EXIT_MEANS else ""
            ended = f" (exit code {code}{known})" if code else ""
            printed = containers.last_lines(stage) or (str(failure) if failure else "")
            raise EngineError(
                f"Stage '{stage}' {problem}{ended}" + (f". Last output: {printed}" if printed else ""),
                where=containers.log(stage),
                fix="correct the cause and run again; `dvc repro` runs the same stages without Docker",
            ) from failure
        outputs[stage] = task_folder / OUT
    if failure is not None:
        raise EngineError(
            f"All stages finished, but kfp's runner failed: {failure}", where=folder, fix="run again"
        ) from failure
    return {stage: outputs[stage] for stage in package.stages}


def _receipt_problem(task_folder: Path, stage: str) -> str:
    try:
        message = json.loads((task_folder / "executor_output.json").read_text(encoding="utf-8"))
        receipt = message["artifacts"][OUT]["artifacts"][0]["metadata"][RECEIPT]
        open_artifact(task_folder / OUT, stage)  # compares the checksums of the folder's files
        if receipt != file_digest(task_folder / OUT / CARD):
            return "left a receipt that does not match its card.json"
    except (OSError, ValueError, LookupError, TypeError):
        return "did not finish"
    except ArtifactError as error:
        return f"left an incomplete output folder ({error.what})"
    return ""
