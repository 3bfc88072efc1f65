"""Where a person sees the runs: the command that shows them, and the address of the runs table."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
from pathlib import Path

from vitpipe.contracts.address import Address
from vitpipe.contracts.shell import typed
from vitpipe.track.runs_view import VIEW, VIEW_TAG
from vitpipe.track.server import EXPERIMENT, OFF, PROBE_SECONDS, is_server
from vitpipe.track.sqlite_store import sqlite_address, sqlite_file

# Where `mlflow ui` listens unless it is told otherwise.
_LOCAL = "http://127.0.0.1:5000"


def ui_lines(address: Address) -> list[str]:
    """One or two lines for the end of a command, without credentials.

    MLflow 3 opens an experiment on its page for traces, so the address is that of the runs table.
    """
    if address == OFF:
        return ["MLflow: tracking is off (VITPIPE_TRACKING)"]
    if is_server(address):
        return [f"MLflow: {str(address).rstrip('/')}/{_page(*_experiment_at(address))}"]
    file, shown = sqlite_file(address), str(address)
    if file is not None and file.is_relative_to(Path.cwd()):
        shown = str(sqlite_address(file.relative_to(Path.cwd())))
    found = _experiment_in(file) if file is not None else _UNKNOWN
    return [
        f"MLflow: {typed('mlflow')} ui --backend-store-uri {shlex.quote(shown)}",
        f"        then {_LOCAL}/{_page(*found)}",
    ]


# ID of our experiment, empty when it is not known, and whether it has the view of `runs_view`.
_UNKNOWN = ("", False)


def _page(number: str, has_view: bool) -> str:
    if not number:
        return "#/experiments"
    view = f"&viewStateShareKey={VIEW}" if has_view else ""
    return f"#/experiments/{number}/runs?workflowType=machine_learning{view}"


def _name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _experiment_in(file: Path) -> tuple[str, bool]:
    """Our experiment in a sqlite file. Importing MLflow would take seconds."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database,
    ):
        asked = "select experiment_id from experiments where name = ?"
        found = database.execute(asked, (_name(),)).fetchone()
        if found:
            asked = "select 1 from experiment_tags where experiment_id = ? and key = ?"
            return str(found[0]), database.execute(asked, (found[0], VIEW_TAG)).fetchone() is not None
    return _UNKNOWN


def _experiment_at(address: Address) -> tuple[str, bool]:
    """Our experiment on a server that answers and wants no password, or has it from the environment."""
    import requests  # type: ignore[import-untyped]  # a dependency of MLflow

    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    with contextlib.suppress(requests.exceptions.RequestException, ValueError, KeyError, TypeError):
        answer = requests.get(
            f"{address.secret.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": _name()},
            auth=(user, password) if user else None,
            timeout=PROBE_SECONDS,
        )
        found = answer.json()["experiment"]
        return str(found["experiment_id"]), any(tag["key"] == VIEW_TAG for tag in found.get("tags", ()))
    return _UNKNOWN
