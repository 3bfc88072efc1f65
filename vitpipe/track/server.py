"""Address of MLflow, and how it is opened: fast when it answers, an immediate error when it does not.

Default: `mlflow.db` (sqlite) in the working folder with `mlartifacts/` beside it, which a bare `mlflow ui`
opens too. `MLFLOW_TRACKING_URI` selects a server; `VITPIPE_TRACKING=off` sends nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitpipe.contracts.address import Address
from vitpipe.track.mlflow_errors import TrackingError, error_code, hide_logged_errors, tracking_errors
from vitpipe.track.sqlite_store import artifact_location, is_escaped, new_store, sqlite_address, sqlite_file

OFF = Address("off")
EXPERIMENT = "vitpipe"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
PROBE_SECONDS = 4.0
# Defaults for variables that the user has not set. With MLflow's own timeout of 120 s and 7 retries, a silent
# server would delay the end of a stage by a quarter of an hour. A retry could also repeat a request that took
# effect before its answer was lost: two runs instead of one.
_MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the printed address contains the password
    "PGCONNECT_TIMEOUT": "5",  # libpq's own default is to wait without limit
}


def store_address(folder: Path) -> Address:
    """Tracking URI from the environment, else the sqlite file in `folder`; `OFF` when tracking is off.

    In a temporary checkout of `dvc exp run --temp` or `--queue`, which DVC removes, it is the sqlite file of
    the repository that the experiment is of.
    """
    if os.environ.get("VITPIPE_TRACKING", "").lower() in ("off", "0", "false"):
        return OFF
    # MLflow 3.17 refuses its former default, a `file:` store.
    home = repository_of_experiment(folder.resolve()) or folder.resolve()
    return Address(named) if (named := os.environ.get(URI_VARIABLE)) else sqlite_address(home / "mlflow.db")


def repository_of_experiment(folder: Path) -> Path | None:
    """The repository whose temporary checkout a folder lies in; None for all other folders."""
    # DVC 3: REPOSITORY/.dvc/tmp/exps/NAME for --queue, .../exps/standalone/NAME for --temp.
    for place in folder.parents:
        if place.parts[-3:] == (".dvc", "tmp", "exps"):
            return place.parents[2]
    return None


def address_to_use(stored: Address, given: Address | None, *, may_have_run: bool) -> Address:
    """Choose the tracking URI for an outbox: where its run is, with credentials from the environment.

    Args:
        stored: from the outbox, without credentials.
        given: the current one, with credentials.
        may_have_run: whether the outbox may have a run in MLflow.
    """
    if OFF in (stored, given):
        return OFF
    # Before the run exists, a corrected address replaces the stored one. Afterwards the run would be split
    # over two servers, so the given address only adds the credentials, and only those of the same server and
    # user.
    if given is not None and (not may_have_run or given.is_shown_as(str(stored))):
        return given
    return stored


def address_in_environment() -> Address | None:
    """The address in `MLFLOW_TRACKING_URI`; None when it is unset or empty."""
    given = os.environ.get(URI_VARIABLE)
    return Address(given) if given else None


def connect(address: Address | str, *, on_answer: Callable[[], None] | None = None) -> Any:
    """Open MLflow and return an `MlflowClient`.

    Args:
        on_answer: called as soon as the server answers, before MLflow is imported (which takes seconds).

    Raises:
        TrackingError: it does not answer within `PROBE_SECONDS`, rejects the request, or cannot be opened.
    """
    address = _as_address(address)
    with tracking_errors(address):
        probe(address)
        if on_answer is not None:
            on_answer()
        # Before the import: MLflow decides about telemetry when it is imported.
        for name, value in _MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        hide_logged_errors()
        with new_store(address):
            client = MlflowClient(tracking_uri=address.secret)
            # The constructor does not connect. This call opens the database and creates its tables if
            # necessary.
            client.search_experiments(max_results=1)
            if is_escaped(address):
                # The registry opens the database by itself, and MLflow then makes the folders that
                # `new_store` removes.
                client.search_registered_models(max_results=1)
        return client


def experiment_id(client: Any, address: Address | str, name: str) -> str:
    """ID of an experiment, which is created if it does not exist.

    Raises:
        TrackingError: the experiment was deleted; MLflow then rejects every run in it, and its name.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(_as_address(address))
        location = artifact_location(file) if file else None  # a server has its own setting
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            # Another process may have created it since the look-up.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return _id_unless_deleted(found, _as_address(address))


def given_experiment(client: Any, address: Address | str, number: str) -> str:
    """ID of the experiment in `MLFLOW_EXPERIMENT_ID`.

    Raises:
        TrackingError: the experiment does not exist or was deleted.
    """
    with tracking_errors(address):
        return _id_unless_deleted(client.get_experiment(number), _as_address(address))


def does_not_exist(error: Exception) -> bool:
    """Whether MLflow itself answers that a run or experiment does not exist, or that its ID is invalid."""
    # MLflow 3.17 answers INVALID_PARAMETER_VALUE to an ID that does not match its pattern, and to a change of
    # a deleted run.
    return error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def probe(address: Address) -> None:
    """Send one request without credentials; any answer counts, also of a proxy or a log-in page.

    Raises:
        OSError: nothing answers (the exceptions of requests are subclasses).
    """
    if not is_server(address):
        return
    import requests  # type: ignore[import-untyped]  # a dependency of MLflow

    # No user, password or token: it is unknown yet which program answers, and redirects are not followed.
    parts = urlsplit(address.secret)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
    # An answer with an untrusted certificate is an answer too; MLflow's first request reports the
    # certificate.
    with contextlib.suppress(requests.exceptions.SSLError):
        requests.get(
            f"{place}/health", timeout=PROBE_SECONDS, allow_redirects=False, stream=True, auth=_no_auth
        ).close()


def is_server(address: Address) -> bool:
    """Whether MLflow is reached over HTTP, unlike a database that its client opens itself."""
    return address.secret.lower().startswith(("http://", "https://"))


def _no_auth(request: Any) -> Any:
    """Authentication that adds nothing. With `auth=None`, requests would send credentials from ~/.netrc."""
    return request


def _as_address(address: Address | str) -> Address:
    return address if isinstance(address, Address) else Address(address)


def _id_unless_deleted(found: Any, address: Address) -> str:
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow's experiment '{found.name}' was deleted",
            where=str(address),
            fix="with MLFLOW_TRACKING_URI set to this address, run "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or set "
            "MLFLOW_EXPERIMENT_NAME to another experiment",
        )
    return str(found.experiment_id)
