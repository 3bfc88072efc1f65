"""Which MLflow a run here would use, whether it answers, and whether it may be written; changes nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import reason_of
from vitpipe.prepare.findings import Finding
from vitpipe.track.mlflow_errors import TrackingError, credentials_fix, tracking_errors
from vitpipe.track.server import EXPERIMENT, OFF, is_server, probe, store_address
from vitpipe.track.sqlite_store import sqlite_file

_SECONDS = 3.0  # per request
_LATER = "runs go on without it and keep their records, which `vitpipe sync` sends"


def examine_mlflow(folder: Path) -> tuple[str, list[Finding]]:
    """The address with what was found there, without credentials, and the findings that need a fix.

    Args:
        folder: where runs are started.
    """
    address = store_address(folder)
    if address == OFF:
        return "off (VITPIPE_TRACKING): nothing is sent", []
    try:
        # Every exception of requests and sqlite becomes an error with its fix.
        with tracking_errors(address):
            if is_server(address):
                return _server(address)
            if (file := sqlite_file(address)) is not None:
                return _sqlite(address, file)
    except TrackingError as error:
        return f"{address}: does not answer", [_warning(error.what, address, error.fix)]
    return f"{address}: not examined, MLflow's client opens it itself", []


def _warning(what: str, address: Address, fix: str) -> Finding:
    return Finding("warning", f"{what}; {_LATER}", str(address), fix)


def _server(address: Address) -> tuple[str, list[Finding]]:
    probe(address)  # without credentials: it is unknown yet which program answers
    number = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    asked = {"experiment_id": number} if number else {"experiment_name": name}
    found = _asked(address, "GET", "experiments/get" if number else "experiments/get-by-name", params=asked)
    answer = _json(found)
    if found.status_code == 404 and answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST" and not number:
        # Refused for want of a name, after the server has decided whether this user may make one.
        tried, place = _asked(address, "POST", "experiments/create", json={}), f"experiment '{name}' is new"
    elif found.ok and "experiment" in answer:
        # A tag without its key changes nothing: the server looks at the rights first and then refuses it.
        known = answer["experiment"]
        content = {"experiment_id": known["experiment_id"]}
        tried = _asked(address, "POST", "experiments/set-experiment-tag", json=content)
        place = f"experiment '{known['name']}'"
        if known.get("lifecycle_stage") == "deleted":
            what = f"MLflow's experiment '{known['name']}' was deleted"
            fix = "restore it, or set MLFLOW_EXPERIMENT_NAME to another one"
            return f"{address}: answers, {place} was deleted", [_warning(what, address, fix)]
    else:
        return f"{address}: answers, and refuses to be read", [_refusal(found, address)]
    if _json(tried).get("error_code") == "INVALID_PARAMETER_VALUE":
        return f"{address}: answers, may be written ({place})", []
    return f"{address}: answers, may not be written ({place})", [_refusal(tried, address)]


def _refusal(answer: Any, address: Address) -> Finding:
    text = " ".join(answer.text.split())[:120] or answer.reason
    if "Invalid Host header" in text:
        fix = "start the server with `--allowed-hosts` that lists this host"
    elif answer.status_code in (401, 403):
        fix = credentials_fix(address)
    else:
        fix = "correct MLFLOW_TRACKING_URI if that is no MLflow server, else read the server's log"
    return _warning(f"MLflow rejects a request (status {answer.status_code}: {text})", address, fix)


def _asked(address: Address, method: str, question: str, **content: Any) -> Any:
    """One request of MLflow's REST interface, with the credentials that MLflow's client would send."""
    import requests  # type: ignore[import-untyped]  # a dependency of MLflow

    user, password, token = (
        os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD", "TOKEN")
    )
    trusted: str | bool = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    return requests.request(
        method,
        f"{address.secret.rstrip('/')}/api/2.0/mlflow/{question}",
        auth=(user, password) if user else None,
        headers={"Authorization": f"Bearer {token}"} if token and not user else None,
        timeout=_SECONDS,
        allow_redirects=False,  # credentials are for this server only
        verify=os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() != "true" and trusted,
        **content,
    )


def _json(answer: Any) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = answer.json()
        return found if isinstance(found, dict) else {}
    return {}


def _sqlite(address: Address, file: Path) -> tuple[str, list[Finding]]:
    if not file.exists():
        above = next(folder for folder in file.absolute().parents if folder.exists())
        if os.access(above, os.W_OK | os.X_OK):
            return f"{address}: will be made by the first run", []
        fix = f"give this user the right to write to {above}, or work elsewhere, or set MLFLOW_TRACKING_URI"
        what = "MLflow's database cannot be made: its folder may not be written"
        return f"{address}: cannot be made", [_warning(what, address, fix)]
    try:
        with contextlib.closing(
            sqlite3.connect(
                f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_SECONDS, isolation_level=None
            )
        ) as database:
            # The lock of a writer, given back at once: nothing is written.
            database.execute("begin immediate")
            (num_runs,) = database.execute("select count(*) from runs").fetchone()
            database.execute("rollback")
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return f"{address}: will be filled by the first run", []
        fix = (
            f"give this user the right to write {file}, end the program that holds it, repair the database, "
            "work in another folder, or set MLFLOW_TRACKING_URI"
        )
        return f"{address}: may not be written", [
            _warning(f"MLflow's database cannot be written ({reason_of(error)})", address, fix)
        ]
    return f"{address}: may be written, runs: {num_runs:,}", []
