"""Where a person sees the runs: the command that shows them, and the address of the runs table."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
from pathlib import Path

from vitpipe.contracts.address import Address
from vitpipe.contracts.shell import typed
from vitpipe.track.server import EXPERIMENT, OFF, PROBE_SECONDS, is_server, sqlite_file

# Where `mlflow ui` listens unless it is told otherwise.
_LOCAL = "http://127.0.0.1:5000"


def ui_lines(address: Address) -> list[str]:
    """One or two lines for the end of a command, without credentials.

    MLflow 3 opens an experiment on its page for traces, so the address is that of the runs table.
    """
    if address == OFF:
        return ["MLflow: tracking is off (VITPIPE_TRACKING)"]
    if is_server(address):
        return [f"MLflow: {str(address).rstrip('/')}/{_page(_number_at(address))}"]
    file, shown = sqlite_file(address), str(address)
    if file is not None and file.is_relative_to(Path.cwd()):
        shown = f"sqlite:///{file.relative_to(Path.cwd())}"
    number = _number_in(file) if file is not None else ""
    return [
        f"MLflow: {typed('mlflow')} ui --backend-store-uri {shlex.quote(shown)}",
        f"        then {_LOCAL}/{_page(number)}",
    ]


def _page(number: str) -> str:
    if not number:
        return "#/experiments"
    return f"#/experiments/{number}/runs?workflowType=machine_learning"


def _name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _number_in(file: Path) -> str:
    """ID of our experiment in a sqlite file; empty when it is not there. Importing MLflow takes seconds."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database,
    ):
        found = database.execute("select experiment_id from experiments where name = ?", (_name(),))
        return str((found.fetchone() or [""])[0])
    return ""


def _number_at(address: Address) -> str:
    """ID of our experiment on a server; empty when it does not answer, or wants a password."""
    import requests  # type: ignore[import-untyped]  # a dependency of MLflow

    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    with contextlib.suppress(requests.exceptions.RequestException, ValueError, KeyError, TypeError):
        answer = requests.get(
            f"{address.secret.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": _name()},
            auth=(user, password) if user else None,
            timeout=PROBE_SECONDS,
        )
        return str(answer.json()["experiment"]["experiment_id"])
    return ""
