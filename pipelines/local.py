"""Run a compiled package on this machine: each task in a Docker container, what is finished not again.

Every run has a folder `ROOT/PIPELINE-TIME-PROCESS`. What reads `artifacts/RECIPE/PROFILE` reads it, too:

    STAGE/             output of a stage; .STAGE.state its training state, .STAGE.unsent what MLflow lacks
    kubeflow/TASK/     what Kubeflow's launcher reads and writes
    logs/TASK.log      everything that a container printed
    pipeline.yaml      the package; local-run.json what the run was started with

Development mode needs no built image: the checkout and the Python environment of this process are mounted
read-only, at their own paths, into a plain Debian image (docker/dev-image.sh makes it).
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.local_containers import DEV_IMAGE as DEV_IMAGE
from pipelines.local_containers import Containers, EngineStoppedError, docker_engine, image_ids
from pipelines.local_graph import imported_places
from pipelines.local_settings import Store, container_settings, passed_on, tracking_store
from pipelines.local_tasks import Outcome, TaskRunner
from pipelines.package import check_arguments, validate_package
from pipelines.package_tasks import read_tasks, without_checks
from vitpipe.contracts.errors import ArtifactError, EngineError, InputError, StoppedError, disk_errors
from vitpipe.contracts.files import read_keys, write_whole
from vitpipe.contracts.processes import sigterm_interrupts
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.stages.folder_lock import holder_of, locked_folders
from vitpipe.verbs.run_folders import LOCAL_RUN
from vitpipe.verbs.show import print_progress

PACKAGE = "pipeline.yaml"


@dataclass(frozen=True)
class LocalOptions:
    """How a run's containers are started; kept in the run's folder.

    Attributes:
        arguments: pipeline parameters.
        data: raw datasets, mounted read-only at the same path.
        shm_gib: size of /dev/shm in each container, GiB.
        memory_gib: the most memory that a container may take, GiB.
        development: mount this checkout and environment instead of using those inside the image.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    shm_gib: int = 2
    memory_gib: float | None = None
    development: bool = False


@dataclass(frozen=True)
class LocalRun:
    """A finished local run: its folder, each stage's output folder, and the MLflow store."""

    folder: Path
    outputs: dict[str, Path]
    store: Store


def run_locally(
    package_path: Path,
    options: LocalOptions | None = None,
    *,
    root: Path,
    reuses: bool = True,
    say: Callable[[str], None] = print_progress,
) -> LocalRun:
    """Run every task of a package that is not finished in an earlier run below `root`.

    Args:
        package_path: a compiled package; it is copied into the run's folder.
        root: folder for runs; each gets a folder of its own.
        reuses: take over outputs and training states of earlier runs.
        say: gets all lines for the terminal.

    Raises:
        InputError: the package, a parameter, the data folder or the MLflow store is wrong.
        EngineError: no Docker engine, a missing image, or a task that failed or left no receipt.
        StoppedError: Ctrl-C or SIGTERM.
        StorageError: the disk refuses a write.
    """
    options = options or LocalOptions()
    package = validate_package(package_path)
    # Random and not the process ID: one process may start two runs within a second.
    folder = root.resolve() / f"{package.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return _run(package_path, folder, options, reuses, say)


def resume_run(
    folder: Path,
    *,
    shm_gib: int | None = None,
    memory_gib: float | None = None,
    reuses: bool = True,
    say: Callable[[str], None] = print_progress,
) -> LocalRun:
    """Go on with a run that failed or was stopped, in its own folder.

    Args:
        folder: the run's folder.
        shm_gib, memory_gib: other values than those that it was started with.

    Raises:
        ArtifactError: there is no such run, or it is running. As `run_locally` beside that.
    """
    folder = folder.resolve()
    try:
        kept = read_keys(folder / LOCAL_RUN)["options"]
        options = LocalOptions(**{**kept, "data": Path(kept["data"]) if kept["data"] else None})
    except (KeyError, TypeError):
        raise ArtifactError(
            "There is no local run in this folder",
            where=folder,
            fix=f"give the folder of a run of `vitpipe local`, which holds {LOCAL_RUN}",
        ) from None
    options = replace(
        options,
        shm_gib=shm_gib or options.shm_gib,
        memory_gib=memory_gib or options.memory_gib,
    )
    return _run(folder / PACKAGE, folder, options, reuses, say)


def _run(
    package_path: Path, folder: Path, options: LocalOptions, reuses: bool, say: Callable[[str], None]
) -> LocalRun:
    package = validate_package(package_path)
    check_arguments(package, options.arguments)
    tasks = without_checks(read_tasks(package_path))
    stages = [task.stage for task in tasks if task.stage]
    if len(set(stages)) < len(stages):
        raise InputError(
            "The package holds several runs, those of a table",
            where=package_path,
            fix="run the table here by `vitpipe table PAPER/NUMBER --run`, or submit the package",
        )
    if launched := [task.stage for task in package.tasks if task.is_launched]:
        raise InputError(
            f"The package runs stages on several nodes ({', '.join(launched)})",
            where=package_path,
            fix="compile it without 'nodes' in the placement, or submit it to a cluster",
        )
    if options.data is not None and not options.data.is_dir():
        raise InputError(
            "The data folder does not exist",
            where=options.data,
            fix="give the folder that holds the raw datasets",
        )
    parameters = {**package.parameters, **options.arguments}
    store = tracking_store(folder.parent)
    if holder := holder_of(folder):
        raise ArtifactError("This run is running", where=folder, fix=f"wait for it ({holder}), or stop it")
    with docker_engine() as client, sigterm_interrupts():
        images = image_ids(client, {task.image for task in tasks if task.image})
        with locked_folders(folder, wait_seconds=0, say=lambda line: None):
            _keep(package_path, folder, options, store)
            settings = _settings(client, folder, store, options, imported_places(tasks, parameters))
            containers = Containers(client, folder / "logs", say)
            runner = TaskRunner(
                tasks, parameters, folder, containers, images, settings, options.development, reuses, say
            )
            _begin(folder, store, settings, say)
            try:
                containers.stop_leftovers(folder)
                outcomes = runner.run_all()
            except KeyboardInterrupt as stop:
                raise _stopped(runner, stop) from None
            except EngineStoppedError as error:
                raise _engine_gone(runner, error) from error
    _require_success(runner, containers, outcomes)
    outputs = {task.stage: folder / task.name for task in tasks if task.stage}
    return LocalRun(folder, outputs, store)


def _keep(package_path: Path, folder: Path, options: LocalOptions, store: Store) -> None:
    """What `--resume` and the verbs that show a run need."""
    with disk_errors(folder):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        if package_path != folder / PACKAGE:
            shutil.copyfile(package_path, folder / PACKAGE)
    values = asdict(options) | {"data": str(options.data.resolve()) if options.data else None}
    text = json.dumps({"options": values, "store": str(store.address)}, indent=2)
    write_whole(folder / LOCAL_RUN, text + "\n")


def _settings(
    client: Any, folder: Path, store: Store, options: LocalOptions, imports: list[Path]
) -> dict[str, Any]:
    return container_settings(
        folder,
        store,
        data=options.data,
        shm_gib=options.shm_gib,
        memory_gib=options.memory_gib,
        development=options.development,
        imports=imports,
        selinux="name=selinux" in client.info().get("SecurityOptions", []),
    )


def _begin(folder: Path, store: Store, settings: dict[str, Any], say: Callable[[str], None]) -> None:
    say(f"Run: {folder}")
    say(f"MLflow store of all local runs: {store.address}")
    if names := passed_on(settings):
        say(f"Variables of this environment that the containers get: {', '.join(names)}")


def _resume(folder: Path) -> str:
    return (
        "the same command takes over what is finished and the saved training states; "
        f"`vitpipe local --resume {folder}` goes on in the same folder"
    )


def _stopped(runner: TaskRunner, stop: KeyboardInterrupt) -> StoppedError:
    done = ", ".join(runner.finished) or "nothing yet"
    at = f" in stage '{runner.current}'" if runner.current else ""
    return StoppedError(
        f"Stopped{at}; finished: {done}",
        where=runner.folder,
        fix=_resume(runner.folder),
        by=stop.args[0] if stop.args else signal.SIGINT,
    )


def _engine_gone(runner: TaskRunner, error: EngineStoppedError) -> EngineError:
    done = ", ".join(runner.finished) or "nothing yet"
    return EngineError(
        f"{error.what.rstrip('.')}; finished: {done}",
        where=runner.folder,
        fix=f"{error.fix}; then {_resume(runner.folder)}",
    )


def _require_success(runner: TaskRunner, containers: Containers, outcomes: Mapping[str, Outcome]) -> None:
    """Raise EngineError when a task failed; the first one with its last lines, the others by name."""
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    skipped = [name for name, outcome in outcomes.items() if outcome.state == "skipped"]
    if not failed:
        return
    first = failed[0]
    printed = containers.last_lines(first)
    what = f"Stage '{first}' {outcomes[first].reason}" + (f". Last output: {printed}" if printed else "")
    if failed[1:]:
        what += f". Failed, too: {', '.join(failed[1:])}"
    if skipped:
        what += f". Not started without it: {', '.join(skipped)}"
    raise EngineError(
        what,
        where=containers.log(first),
        fix=f"correct the cause; then {_resume(runner.folder)}. `dvc repro` runs the same stages without "
        "Docker",
    )


def unsent_lines(folder: Path) -> list[str]:
    """What to do about records of a run that MLflow has not got; nothing when it has all of them."""
    from vitpipe.track.sync import outboxes_below

    with suppress(OSError, ValueError):
        if any(not outbox.is_delivered() for outbox in outboxes_below(folder)):
            command = with_typed_commands(f"`vitpipe sync {folder}`")
            return [f"MLflow has not received all records of this run; {command} sends them"]
    return []
