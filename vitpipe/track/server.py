"""Where MLflow is and how it is opened: quickly when it answers, at once an error when it does not.

Default: `mlflow.db` (sqlite) in the working folder with `mlartifacts/` beside it, which is also what a
bare `mlflow ui` opens. `MLFLOW_TRACKING_URI` names a server; `VITPIPE_TRACKING=off` sends nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitpipe.contracts.address import Address
from vitpipe.contracts.shell import typed
from vitpipe.track.refusal import TrackingError, error_code, tracking_errors

__all__ = ["TrackingError", "tracking_errors"]

OFF = Address("off")
EXPERIMENT = "vitpipe"
URI = "MLFLOW_TRACKING_URI"
PROBE_SECONDS = 4.0
# MLflow's own patience (seven tries of two minutes) would hold up the end of a stage for a quarter hour. Its
# retries would also repeat a request that had its effect before the answer got lost: two runs instead of one.
_IMPATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the address that it prints holds the password
    "PGCONNECT_TIMEOUT": "5",
}


def store_address(folder: Path) -> Address:
    """Tracking URI from the environment, else the sqlite file in `folder`; `OFF` when switched off."""
    if os.environ.get("VITPIPE_TRACKING", "").lower() in ("off", "0", "false"):
        return OFF
    return Address(os.environ.get(URI) or f"sqlite:///{folder.resolve() / 'mlflow.db'}")


def address_to_use(stored: Address, given: Address | None, *, is_told: bool) -> Address:
    """The address for an outbox: where its run is, with the credentials that only the environment has.

    Args:
        stored: from the outbox, without credentials.
        given: the present one, with credentials.
        is_told: whether the run is in MLflow already; before that, a corrected address is the better one.
    """
    if OFF in (stored, given):
        return OFF
    if given is not None and (not is_told or given.is_shown_as(str(stored))):
        return given
    return stored


def address_in_environment() -> Address | None:
    """The address that `MLFLOW_TRACKING_URI` names, if it names one."""
    given = os.environ.get(URI)
    return Address(given) if given else None


def ui_command(address: Address | str) -> str:
    """What to type, or where to look, to see the runs; without credentials."""
    address = _address(address)
    if address == OFF:
        return "tracking is off (VITPIPE_TRACKING)"
    if is_server(address):
        return str(address)
    file, shown = _sqlite_file(address), str(address)
    if file is not None and file.is_relative_to(Path.cwd()):
        shown = f"sqlite:///{file.relative_to(Path.cwd())}"
    return f"{typed('mlflow')} ui --backend-store-uri {shlex.quote(shown)}"


def connect(address: Address | str, *, answered: Callable[[], None] | None = None) -> Any:
    """Open the store and return an `MlflowClient`.

    Args:
        answered: called as soon as it is known that something answers, before MLflow is imported.

    Raises:
        TrackingError: when it does not answer within `PROBE_SECONDS`, refuses, or cannot be opened.
    """
    address = _address(address)
    with tracking_errors(address):
        probe(address)
        if answered is not None:
            answered()
        for name, value in _IMPATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        with _migration_lock(address):
            client = MlflowClient(tracking_uri=address.secret)
            client.search_experiments(max_results=1)  # opens the database, makes its tables if need be
        return client


def experiment_id(client: Any, address: Address | str, name: str) -> str:
    """The number of an experiment, made if need be; two processes may ask at the same time.

    Raises:
        TrackingError: the experiment was deleted; MLflow then refuses everything that has its name.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(_address(address)))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return _not_deleted(found, _address(address))


def given_experiment(client: Any, address: Address | str, number: str) -> str:
    """The experiment that `MLFLOW_EXPERIMENT_ID` names.

    Raises:
        TrackingError: there is none of that number, or it was deleted.
    """
    with tracking_errors(address):
        return _not_deleted(client.get_experiment(number), _address(address))


def does_not_exist(error: Exception) -> bool:
    """Whether MLflow itself says that a run or an experiment does not exist, or cannot be one."""
    return error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def probe(address: Address) -> None:
    """Ask a server once whether anything answers; any answer will do, also of a proxy or a log-in page.

    Carries no credentials: it is not known yet who is there.

    Raises:
        OSError: nothing answers (exceptions of requests are among these).
    """
    if not is_server(address):
        return
    import requests  # type: ignore[import-untyped]  # comes with MLflow

    parts = urlsplit(address.secret)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
    # An answer without a certificate that we trust is an answer too; the first real request says more.
    with contextlib.suppress(requests.exceptions.SSLError):
        requests.get(
            f"{place}/health", timeout=PROBE_SECONDS, allow_redirects=False, stream=True, auth=_as_it_is
        ).close()


def is_server(address: Address) -> bool:
    """Whether it is spoken to over HTTP, unlike a database that MLflow opens itself."""
    return address.secret.lower().startswith(("http://", "https://"))


def _as_it_is(request: Any) -> Any:
    """An authentication that adds nothing; without one, requests would look into ~/.netrc."""
    return request


def _address(address: Address | str) -> Address:
    return address if isinstance(address, Address) else Address(address)


def _not_deleted(found: Any, address: Address) -> str:
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow's experiment '{found.name}' was deleted",
            where=str(address),
            fix="with MLFLOW_TRACKING_URI set to this address, run "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or name another experiment "
            "by MLFLOW_EXPERIMENT_NAME",
        )
    return str(found.experiment_id)


def _sqlite_file(address: Address) -> Path | None:
    whole = address.secret
    return Path(whole.removeprefix("sqlite:///")) if whole.startswith("sqlite:///") else None


def _artifact_location(address: Address) -> str | None:
    """Beside a sqlite file; a server decides for itself."""
    file = _sqlite_file(address)
    return (file.resolve().parent / "mlartifacts").as_uri() if file else None


@contextmanager
def _migration_lock(address: Address) -> Iterator[None]:
    """Two stages that start at once on a new sqlite file would both make its tables, and one would fail."""
    file = _sqlite_file(address)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
