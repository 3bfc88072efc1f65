"""What every container of a local run gets: mounts, user, memory, environment, and the one MLflow store."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import Address
from vitpipe.contracts.discovery import PLUGINS_VARIABLE, plugin_folders
from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.track.server import OFF, URI_VARIABLE, is_server, store_address
from vitpipe.track.sqlite_store import sqlite_address, sqlite_file

CHECKOUT = Path(__file__).resolve().parent.parent
STORE_FOLDER = "mlflow"  # below the folder of all runs
# Only what a stage reads itself: the environment of a shell may hold credentials for other things. Not
# MLFLOW_RUN_ID: every stage would continue that one run.
_PASSED_ON = (
    "OMP_NUM_THREADS",
    "VITPIPE_TRACKING",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
# Variables whose values are files, which are mounted.
_FILES = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
# Of no interest to anybody who wonders what a container has got.
_UNSAID = ("OMP_NUM_THREADS", "VITPIPE_TRACKING")


@dataclass(frozen=True)
class Store:
    """Where the stages track their runs.

    Attributes:
        address: as the stages get it, with credentials.
        folder: mounted for writing, if the store is a file.
    """

    address: Address
    folder: Path | None = None


def tracking_store(root: Path) -> Store:
    """The MLflow store of all runs below `root`: the one of the environment, else a file there.

    Args:
        root: folder of the local runs, absolute.

    Raises:
        InputError: the environment names a store that a container cannot reach.
    """
    if (given := store_address(Path.cwd())) == OFF:
        return Store(OFF)
    if not os.environ.get(URI_VARIABLE):
        folder = root / STORE_FOLDER
        return Store(sqlite_address(folder / "mlflow.db"), folder)
    if is_server(given):
        return Store(given)
    if (file := sqlite_file(given)) is not None:
        file = Path.cwd() / file
        _refuse_unmountable(file.parent, given)
        return Store(sqlite_address(file), file.parent)
    scheme, mark, _ = given.secret.partition("://")
    if not mark or scheme in ("file", "sqlite"):
        raise _no_store(
            given,
            "is neither a server nor a file of sqlite; what a container writes elsewhere is lost with it",
        )
    return Store(given)  # a database server


def _refuse_unmountable(folder: Path, given: Address) -> None:
    """Mounting the checkout, or what holds it, for writing would hand all of it to the containers."""
    own = (CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), Path.home())
    if any(place.is_relative_to(folder.resolve()) for place in own):
        raise _no_store(
            given, f"lies in {folder}, which is not mounted into containers, so it would be lost with them"
        )


def _no_store(given: Address, why: str) -> InputError:
    return InputError(
        f"The MLflow store '{given}' {why}",
        where=URI_VARIABLE,
        fix=f"unset {URI_VARIABLE} (all local runs then share one store, which is named at the end), give a "
        "sqlite file in a folder of its own, or the address of a server (`mlflow server`)",
    )


def container_settings(
    folder: Path,
    store: Store,
    *,
    data: Path | None,
    shm_gib: int,
    memory_gib: float | None,
    development: bool,
    imports: Iterable[Path] = (),
    selinux: bool = False,
) -> dict[str, Any]:
    """Arguments of every `docker create`.

    Args:
        folder: the run's folder, mounted for writing.
        data: raw datasets, mounted read-only.
        memory_gib: the most memory a container may take, GiB.
        imports: further files and folders that tasks read.
        selinux: the engine needs its label on what is mounted for writing.

    Raises:
        StorageError: the disk refuses to make the store's folder.
    """
    from docker.types import Mount

    files = _file_variables()
    environment = _environment(store, files, development)
    read_only = [*([data.resolve()] if data is not None else []), *files.values(), *imports]
    if development:
        read_only += [CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), *plugin_folders()]
    writable = [folder, *([store.folder] if store.folder else [])]
    for place in writable:
        # Made before it is mounted: the Docker daemon creates a missing folder as root, and a container that
        # runs as this user then fails with "Permission denied".
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "user": f"{os.getuid()}:{os.getgid()}",  # Docker's default is root, which would own the outputs
        "shm_size": f"{shm_gib}g",  # Docker's default of 64 MiB is too small for loader processes
        "volumes": {
            str(place): {"bind": str(place), "mode": "rw,z" if selinux else "rw"} for place in writable
        },
        # Same path inside as outside, so that paths in recipes and error messages hold in both. Without
        # duplicates: Docker refuses two mounts at one place, and outside a virtual environment prefix and
        # base_prefix are the same.
        "mounts": [
            Mount(str(path), str(path), type="bind", read_only=True) for path in dict.fromkeys(read_only)
        ],
        "environment": environment,
        "working_dir": str(folder),
        "init": True,  # process 1 that forwards SIGTERM and reaps loader processes
    }
    if memory_gib is not None:
        # Without swap beyond it: a stage that swaps is slower than one that fails and says so.
        settings["mem_limit"] = settings["memswap_limit"] = round(memory_gib * 2**30)
    settings.update(_network(store, environment))
    return settings


def _network(store: Store, environment: Mapping[str, str]) -> dict[str, str]:
    if (store.folder is None and store.address != OFF) or any("ENDPOINT_URL" in name for name in environment):
        return {"network_mode": "host"}  # the server may be one on this machine
    # As with the network of this machine. Locks name it: what a killed container of this machine has left is
    # taken over at once, of another machine after minutes.
    return {"hostname": socket.gethostname()}


def _environment(store: Store, files: Mapping[str, Path], development: bool) -> dict[str, str]:
    environment = {
        "HOME": "/tmp",  # the uid has no home in the image, and caches need a writable one
        "USER": "vitpipe",  # getpass.getuser() fails for a uid without a name, and libraries call it
        "PYTHONUNBUFFERED": "1",  # else the last lines before a crash are lost
        **{name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)},
        **{name: str(path) for name, path in files.items()},
    }
    if store.address != OFF:
        environment[URI_VARIABLE] = store.address.secret
    if development:
        environment["PATH"] = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        environment["PYTHONPATH"] = str(CHECKOUT)
        # A container has no params.yaml, which names them.
        environment[PLUGINS_VARIABLE] = os.pathsep.join(map(str, plugin_folders()))
    return environment


def passed_on(settings: dict[str, Any]) -> list[str]:
    """Names of the user's variables that the containers got; never their values."""
    return [
        name for name in (*_PASSED_ON, *_FILES) if name in settings["environment"] and name not in _UNSAID
    ]


def _file_variables() -> dict[str, Path]:
    """Variable -> the file that it names; with a profile of AWS also the files where profiles lie."""
    named = {name: Path(os.environ[name]) for name in _FILES if os.environ.get(name)}
    if os.environ.get("AWS_PROFILE"):
        home = Path.home() / ".aws"
        named = {
            "AWS_SHARED_CREDENTIALS_FILE": home / "credentials",
            "AWS_CONFIG_FILE": home / "config",
            **named,
        }
    return {name: path.absolute() for name, path in named.items() if path.exists()}
