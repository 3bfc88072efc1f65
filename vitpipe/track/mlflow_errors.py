"""Errors of MLflow as one `TrackingError` whose fix fits the cause.

No server at the address, a server that accepts connections and never answers, one that fails with an error of
its own, and one that rejects a request need four different fixes. MLflow wraps all of them in one exception
class; the cause is in the chain of exceptions below it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import RunError, VitpipeError
from vitpipe.track.sqlite_store import sqlite_file

# A proxy answers with a whole HTML page, which MLflow quotes.
_MAX_REASON_LENGTH = 300
# Names instead of classes: requests, urllib3 and sqlalchemy need not be imported to compare them.
_TIMEOUTS = {
    "TimeoutError",
    "Timeout",
    "ConnectTimeout",
    "ReadTimeout",
    "ReadTimeoutError",
    "ConnectTimeoutError",
}
# MLflow's codes for a failure of its own, not of the request.
_FAILURES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")
_SYNC_LATER = "then run `vitpipe sync`"
_START = f"start the server or correct MLFLOW_TRACKING_URI, {_SYNC_LATER}"


class TrackingError(RunError):
    """MLflow does not answer, answers with an error, or rejects a request."""


class NoAnswerError(TrackingError):
    """MLflow does not answer at all: further requests to this address can be skipped for now."""


@contextmanager
def tracking_errors(address: Address | str) -> Iterator[None]:
    """Turn every exception of MLflow and of the libraries below it into a `TrackingError`.

    Raises:
        TrackingError: see above; the exception is its cause.
    """
    try:
        yield
    except (VitpipeError, AttributeError, TypeError, LookupError, AssertionError):
        raise  # already typed, or a programming error that must keep its traceback
    except Exception as error:  # requests, urllib3, sqlalchemy, sqlite3, OSError, MlflowException
        raise _explained(error, address if isinstance(address, Address) else Address(address)) from error


def hide_logged_errors() -> None:
    """Keep MLflow from writing a traceback of the database beside the `TrackingError` that tells it."""
    logging.getLogger("mlflow.store.db.utils").addFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def error_code(error: Exception) -> str:
    """MLflow's error code, for example `INVALID_PARAMETER_VALUE`; empty when MLflow itself did not answer."""
    # For a 404 of a proxy or another program at that address, MLflow's client also sets an error code (by the
    # HTTP status). That must not be taken for "this run does not exist".
    if type(error).__module__.startswith("mlflow.") and _is_answer(error):
        return str(getattr(error, "error_code", ""))
    return ""


def _explained(error: Exception, address: Address) -> TrackingError:
    names = {type(link).__name__ for link in _chain(error)}
    if names & {"gaierror", "NameResolutionError"}:
        what = "MLflow does not answer (host name not found)"
        return NoAnswerError(
            what, where=str(address), fix=f"correct the host in MLFLOW_TRACKING_URI, {_SYNC_LATER}"
        )
    if "SSLError" in names:
        return TrackingError(
            f"MLflow's certificate is not trusted ({_reason(error)})",
            where=str(address),
            fix="set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its authority",
        )
    if "ConnectionRefusedError" in names:
        return NoAnswerError("MLflow does not answer (connection refused)", where=str(address), fix=_START)
    if names & _TIMEOUTS:
        what = "MLflow does not answer (timeout)"
        fix = f"check whether the server is overloaded or a firewall drops the connection, {_SYNC_LATER}"
        return NoAnswerError(what, where=str(address), fix=fix)
    # MLflow 3.17 has urllib3 retry the statuses 408, 429, 500, 502, 503 and 504. With no retries left
    # (server.py allows none) they end as these exceptions, not as an answer; only the last one names the
    # status.
    if names & {"RetryError", "ResponseError"}:
        return _server_error(_reason(_chain(error)[-1]), address)
    if type(error).__module__.startswith("mlflow.") and _is_answer(error, strictly=False):
        return _rejection(error, address)
    if _is_http(address):
        return NoAnswerError(f"MLflow does not answer ({_reason(error)})", where=str(address), fix=_START)
    return _database_error(error, address)


def _rejection(error: Exception, address: Address) -> TrackingError:
    code, reason = str(getattr(error, "error_code", "")), _reason(error)
    is_failure = code in _FAILURES
    # Without a server, MLflow's client itself gives these codes to whatever the database says.
    if is_failure and not _is_http(address):
        return _database_error(error, address)
    # First, because its status 403 has the code PERMISSION_DENIED: MLflow 3.17 rejects unknown host names,
    # while its /health stays green, so that the probe does not notice.
    if "Invalid Host header" in reason:
        fix = "start the server with `--allowed-hosts` that lists this host"
    elif code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"):
        fix = credentials_fix(address)
    elif is_failure:
        return _server_error(reason, address)
    # The code that MLflow's client gives to a 404 whose body is not MLflow's JSON.
    elif code == "ENDPOINT_NOT_FOUND":
        fix = "correct MLFLOW_TRACKING_URI: another program answers there, or the path to MLflow is missing"
    # A missing experiment and an invalid ID have codes that other objects share; only the text names
    # experiments.
    elif "xperiment" in reason:
        fix = "correct MLFLOW_EXPERIMENT_ID, or unset it and set MLFLOW_EXPERIMENT_NAME"
    elif "scheme" in reason:
        fix = "correct MLFLOW_TRACKING_URI, for example http://HOST:5000 or sqlite:////PATH/mlflow.db"
    else:
        fix = f"read the server's log for this request and compare the versions of MLflow, {_SYNC_LATER}"
    return TrackingError(f"MLflow at {address} rejected a request ({reason})", where=str(address), fix=fix)


def credentials_fix(address: Address) -> str:
    """How to give MLflow the credentials that it requires; outboxes never store them."""
    if "***" in address.secret:  # the address was read from an outbox, without its password
        return (
            f"set MLFLOW_TRACKING_URI to this address with its password ({address}; the password is "
            f"not stored), {_SYNC_LATER}"
        )
    return (
        "correct the user and password in MLFLOW_TRACKING_URI (or MLFLOW_TRACKING_USERNAME and "
        f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), {_SYNC_LATER}"
    )


def _server_error(reason: str, address: Address) -> TrackingError:
    return TrackingError(
        f"MLflow answers with an error ({reason})",
        where=str(address),
        fix=f"read the server's log, {_SYNC_LATER}",
    )


def _database_error(error: Exception, address: Address) -> TrackingError:
    """The error for a database that MLflow's client opens itself, without a server."""
    fix = f"correct MLFLOW_TRACKING_URI or repair the database, {_SYNC_LATER}"
    if file := sqlite_file(address):
        fix = (
            f"repair the database, or give this user the right to write {file} and its folder, or work in "
            f"another folder, or set MLFLOW_TRACKING_URI to another database or a server, {_SYNC_LATER}"
        )
    if isinstance(error, ImportError):  # the driver that the address names, for example psycopg2
        fix = "install that module beside MLflow, or set MLFLOW_TRACKING_URI to a server"
    elif "***" in address.secret:
        fix = credentials_fix(address)
    return TrackingError(
        f"MLflow's database cannot be opened ({_reason(error)})", where=str(address), fix=fix
    )


def _is_http(address: Address) -> bool:
    return address.secret.lower().startswith(("http://", "https://"))


def _is_answer(error: Exception, *, strictly: bool = True) -> bool:
    """Whether MLflow answered, or at least (not `strictly`) any program at its address."""
    # The texts are those of mlflow/utils/rest_utils.py (3.17). "API request to URL failed with exception":
    # the request did not get through. "API request to endpoint ... failed with error code": an answer that is
    # not MLflow's JSON. An answer of MLflow's own is a RestException, whose text starts with the error code.
    text = str(error)
    if "failed with exception" in text or "failed with timeout" in text:
        return False
    return not (strictly and text.startswith("API request to"))


def _chain(error: BaseException) -> list[Any]:
    """The exception and its causes, the outermost first."""
    links: list[Any] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        # MLflow 3.17 sets the cause (`raise ... from`) for timeouts only; others are in the context.
        link = link.__cause__ or link.__context__
    return links


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix("API request to ")[:_MAX_REASON_LENGTH]
