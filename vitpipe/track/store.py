"""Where MLflow is and how it is opened: quickly when it answers, at once an error when it does not.

Default: `mlflow.db` (sqlite) in the working folder with `mlartifacts/` beside it, which is also what a
bare `mlflow ui` opens. `MLFLOW_TRACKING_URI` names a server; `VITPIPE_TRACKING=off` sends nothing.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitpipe.errors import RunError
from vitpipe.shell import typed

OFF = "off"
EXPERIMENT = "vitpipe"
_PROBE_SECONDS = 2.0
# MLflow's own patience (seven tries of two minutes) would hold up the end of a stage for a quarter hour.
_IMPATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class StoreError(RunError):
    """MLflow does not answer or refuses."""


def store_address(folder: Path) -> str:
    """Tracking URI from the environment, else the sqlite file in `folder`; `off` when switched off."""
    if os.environ.get("VITPIPE_TRACKING", "").lower() in ("off", "0", "false"):
        return OFF
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def ui_command(address: str) -> str:
    """What to type, or where to look, to see the runs."""
    if address == OFF:
        return "tracking is off (VITPIPE_TRACKING)"
    if address.startswith("http"):
        return address
    file = _sqlite_file(address)
    if file is not None and file.is_relative_to(Path.cwd()):
        address = f"sqlite:///{file.relative_to(Path.cwd())}"
    return f"{typed('mlflow')} ui --backend-store-uri {shlex.quote(address)}"


def connect(address: str) -> Any:
    """Open the store and return an `MlflowClient`.

    Raises:
        StoreError: when it does not answer within two seconds, or cannot be opened.
    """
    with store_errors(address):
        _probe(address)
        for name, value in _IMPATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        with _migration_lock(address):
            client = MlflowClient(tracking_uri=address)
            client.search_experiments(max_results=1)  # opens the database, makes its tables if need be
        return client


def experiment_id(client: Any, address: str, name: str) -> str:
    """The number of an experiment, made if need be; two processes may ask at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(address))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


@contextmanager
def store_errors(address: str) -> Iterator[None]:
    """Turn whatever MLflow and the libraries below it raise into a `StoreError`."""
    try:
        yield
    except (StoreError, AttributeError, TypeError, LookupError, AssertionError):
        raise  # ours, or a defect of ours that must keep its traceback
    except Exception as error:  # requests, urllib3, sqlalchemy, sqlite3, OSError, MlflowException
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StoreError(
            f"MLflow does not answer ({reason[:300]})",
            where=address,
            mend="start the server or correct MLFLOW_TRACKING_URI, then run `vitpipe send FOLDER`",
        ) from error


def _probe(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not any(os.environ.get(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")):
        socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()


def _sqlite_file(address: str) -> Path | None:
    return Path(address.removeprefix("sqlite:///")) if address.startswith("sqlite:///") else None


def _artifact_location(address: str) -> str | None:
    """Beside a sqlite file; a server decides for itself."""
    file = _sqlite_file(address)
    return (file.resolve().parent / "mlartifacts").as_uri() if file else None


@contextmanager
def _migration_lock(address: str) -> Iterator[None]:
    """Two stages that start at once on a new sqlite file would both make its tables, and one would fail."""
    file = _sqlite_file(address)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
