"""Why MLflow did not take something, in words that lead to the right fix.

A server that is not there, one that accepts connections and says nothing, one that answers with an error
of its own, and one that refuses what it was asked are four different things to fix. MLflow wraps all of
them into one kind of exception; what really happened stands in the chain of causes below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import RunError, VitpipeError

_LONGEST_REASON = 300
_TIMEOUTS = {
    "TimeoutError",
    "Timeout",
    "ConnectTimeout",
    "ReadTimeout",
    "ReadTimeoutError",
    "ConnectTimeoutError",
}
_SEND_LATER = "then run `vitpipe send FOLDER`"
_START = f"start the server or correct MLFLOW_TRACKING_URI, {_SEND_LATER}"


class TrackingError(RunError):
    """MLflow does not answer, answers with an error, or refuses."""


class NoAnswerError(TrackingError):
    """MLflow does not answer at all: it need not be asked anything else for now."""


@contextmanager
def tracking_errors(address: Address | str) -> Iterator[None]:
    """Turn whatever MLflow and the libraries below it raise into a `TrackingError`."""
    try:
        yield
    except (VitpipeError, AttributeError, TypeError, LookupError, AssertionError):
        raise  # ours, or a defect of ours that must keep its traceback
    except Exception as error:  # requests, urllib3, sqlalchemy, sqlite3, OSError, MlflowException
        raise _explained(error, address if isinstance(address, Address) else Address(address)) from error


def error_code(error: Exception) -> str:
    """MLflow's code of a refusal, as `INVALID_PARAMETER_VALUE`; empty when MLflow did not answer.

    A 404 of something in between (a proxy, another program at that address) has the code of MLflow that
    fits the number best, but is not MLflow's word that a run or an experiment does not exist.
    """
    if type(error).__module__.startswith("mlflow.") and _is_answer(error):
        return str(getattr(error, "error_code", ""))
    return ""


def _explained(error: Exception, address: Address) -> TrackingError:
    names = {type(link).__name__ for link in _chain(error)}
    is_http = address.secret.lower().startswith(("http://", "https://"))
    if names & {"gaierror", "NameResolutionError"}:
        what = "MLflow does not answer (the name of its host is not known here)"
        return NoAnswerError(
            what, where=str(address), fix=f"correct the host in MLFLOW_TRACKING_URI, {_SEND_LATER}"
        )
    if "SSLError" in names:
        return TrackingError(
            f"MLflow's certificate is not accepted ({_reason(error)})",
            where=str(address),
            fix="name the certificate of its authority by MLFLOW_TRACKING_SERVER_CERT_PATH",
        )
    if "ConnectionRefusedError" in names:
        return NoAnswerError("MLflow does not answer (connection refused)", where=str(address), fix=_START)
    if names & _TIMEOUTS:
        what = "MLflow does not answer (connected, or tried to, and heard nothing in time)"
        fix = f"see whether the server is overloaded or something stands between, {_SEND_LATER}"
        return NoAnswerError(what, where=str(address), fix=fix)
    if names & {"RetryError", "ResponseError"}:
        return _server_error(_reason(_chain(error)[-1]), address)
    if type(error).__module__.startswith("mlflow.") and _is_answer(error, strictly=False):
        return _refusal(error, address)
    if is_http:
        return NoAnswerError(f"MLflow does not answer ({_reason(error)})", where=str(address), fix=_START)
    return _unopened(error, address)


def _refusal(error: Exception, address: Address) -> TrackingError:
    code, reason = str(getattr(error, "error_code", "")), _reason(error)
    if "Invalid Host header" in reason:
        fix = "start the server with `--allowed-hosts` that names this host"
    elif code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"):
        fix = credentials_fix(address)
    elif code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"):
        return _server_error(reason, address)
    elif code == "ENDPOINT_NOT_FOUND":
        fix = "correct MLFLOW_TRACKING_URI: another program answers there, or the path to MLflow is missing"
    elif "xperiment" in reason:
        fix = "correct MLFLOW_EXPERIMENT_ID, or take it away and name an experiment by MLFLOW_EXPERIMENT_NAME"
    elif "scheme" in reason:
        fix = "correct MLFLOW_TRACKING_URI, for example http://HOST:5000 or sqlite:////PATH/mlflow.db"
    else:
        fix = f"see the server's log for this request and compare versions of MLflow, {_SEND_LATER}"
    return TrackingError(f"MLflow at {address} refused ({reason})", where=str(address), fix=fix)


def credentials_fix(address: Address) -> str:
    """How to give MLflow the credentials that it asks for; they are never stored with what is to be sent."""
    if "***" in address.secret:
        return (
            f"set MLFLOW_TRACKING_URI to this address with its password ({address}; the password is "
            f"not stored), {_SEND_LATER}"
        )
    return (
        "correct the user and password in MLFLOW_TRACKING_URI (or MLFLOW_TRACKING_USERNAME and "
        f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), {_SEND_LATER}"
    )


def _server_error(reason: str, address: Address) -> TrackingError:
    return TrackingError(
        f"MLflow answers with an error ({reason})",
        where=str(address),
        fix=f"see the server's log, {_SEND_LATER}",
    )


def _unopened(error: Exception, address: Address) -> TrackingError:
    """A database that MLflow opens itself, without a server."""
    fix = f"correct MLFLOW_TRACKING_URI or make the database usable, {_SEND_LATER}"
    if isinstance(error, ImportError):
        fix = "install that module beside MLflow, or name a server by MLFLOW_TRACKING_URI"
    elif "***" in address.secret:
        fix = credentials_fix(address)
    return TrackingError(f"MLflow's store cannot be opened ({_reason(error)})", where=str(address), fix=fix)


def _is_answer(error: Exception, *, strictly: bool = True) -> bool:
    """Whether MLflow, or at least something in its place (not `strictly`), said this."""
    text = str(error)
    if "failed with exception" in text or "failed with timeout" in text:
        return False
    return not (strictly and text.startswith("API request to"))


def _chain(error: BaseException) -> list[Any]:
    links: list[Any] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix("API request to ")[:_LONGEST_REASON]
