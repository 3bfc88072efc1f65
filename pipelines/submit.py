"""Upload a package to a Kubeflow endpoint, start a run and optionally wait for its final state.

The same with Kubeflow's own command, which stores no version of the pipeline:

    kfp --endpoint URL run create --experiment-name vitpipe --package-file build/pipeline.yaml

Its `--wait` exits with code 0 for a failed run; `vitpipe submit --wait` exits with code 1.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.package import Package, check_arguments, validate_package
from vitpipe.config.digest import file_digest
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import EngineError, InputError

# The final ones of the v2beta1 API's RuntimeState.
_SUCCEEDED = "SUCCEEDED"
_ENDED = {_SUCCEEDED, "FAILED", "SKIPPED", "CANCELED", "ERROR"}
_PROBE_SECONDS = 10


@dataclass(frozen=True)
class Endpoint:
    """A Kubeflow Pipelines API.

    Attributes:
        address: without credentials, for messages, links and the client.
        authorization: value of the HTTP header, `Basic ...` or `Bearer ...`; empty without credentials.
    """

    address: str
    # repr=False: tracebacks and logs print the repr.
    authorization: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str, token: str | None = None) -> Endpoint:
        """Parse an address that may contain user and password, or comes with a bearer token.

        Raises:
            InputError: when it is not the address of an API, or has credentials in addition to a token.
        """
        try:
            parts = urlsplit(text)
            # A query or fragment would come before the API's path, which is appended to the address.
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_address = is_address and parts.port != 0 and not (parts.query or parts.fragment)
            is_address = is_address and text.isprintable() and " " not in text
        except ValueError:  # of parts.port: not a number, which an unescaped / in a password causes
            is_address = False
        if not is_address:
            raise InputError(
                f"'{text}' is not an API address",
                where="--endpoint",
                fix="write http://host:port or https://host/path; in a password write / as %2F and @ as %40",
            )
        user, at, place = parts.netloc.rpartition("@")
        if at and token:
            raise InputError(
                "Both a bearer token and credentials in the address were given",
                where="--endpoint, --token",
                fix="give only one of them; the token may come from the variable KFP_TOKEN",
            )
        # RFC 7617: base64 of "user:password", after the URL's escapes are undone.
        words = base64.b64encode(unquote(user).encode()).decode()
        header = f"Basic {words}" if at else f"Bearer {token}" if token else ""
        return cls(parts._replace(netloc=place).geturl().rstrip("/"), header)


@dataclass(frozen=True)
class Submission:
    """A run on an endpoint. `state` is Kubeflow's name of the state, `url` the run's page."""

    run_id: str
    url: str
    state: str
    pipeline_id: str
    version_id: str


def submit(
    package_path: Path,
    endpoint: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    experiment: str = "vitpipe",
    namespace: str | None = None,
    token: str | None = None,
    service_account: str | None = None,
    wait: bool = False,
    poll_seconds: float = 15.0,
    timeout_hours: float = 336.0,
) -> Submission:
    """Upload the package as a version of its pipeline, start a run, optionally wait.

    The version is named after the digest of the package, so uploading the same package again adds no version.

    Args:
        package_path: a compiled package.
        endpoint: address of the Kubeflow Pipelines API, for example http://localhost:8080; user and password
            in it are sent as HTTP Basic authentication and never shown.
        arguments: pipeline parameters of this run.
        experiment: name of the experiment; created when it does not exist.
        namespace: Kubernetes namespace, for a multi-user endpoint.
        token: bearer token, if the endpoint requires one.
        service_account: Kubernetes service account of the run's pods.
        wait: return when the run has ended.
        poll_seconds: time between two requests for the run's state.
        timeout_hours: longest wait; 14 days by default. The run itself is not stopped.

    Raises:
        InputError: the package is invalid or has no such parameter, or `endpoint` is not an API address.
        EngineError: the endpoint cannot be reached or refuses the request, or the run did not succeed.
    """
    package = validate_package(package_path)
    check_arguments(package, arguments or {})
    api = Endpoint.of(endpoint, token)
    _probe(api)
    with _client_errors(api.address):
        client = _client(api, namespace)
        pipeline_id, version_id = _upload(client, package, namespace)
        run = client.run_pipeline(
            experiment_id=client.create_experiment(experiment, namespace=namespace).experiment_id,
            job_name=f"{package.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            params=dict(arguments or {}),
            pipeline_id=pipeline_id,
            version_id=version_id,
            service_account=service_account,
        )
        # kfp prints this link only, and shows it as HTML in notebooks; it does not return it.
        url = f"{api.address}/#/runs/details/{run.run_id}"
        if wait:
            run = _wait(client, run.run_id, url, poll_seconds, timeout_hours)
    return Submission(run.run_id, url, run.state or "PENDING", pipeline_id, version_id)


def _probe(endpoint: Endpoint) -> None:
    """Request the endpoint's health, with an error message that names the likely cause."""
    # Before kfp is imported, which takes 3 s, and because its client retries an unreachable host for long and
    # logs a warning for each attempt.
    address = f"{endpoint.address}/apis/v2beta1/healthz"
    fix = (
        "check the address; from outside the cluster forward it first: "
        "kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80, then --endpoint http://localhost:8080"
    )
    try:
        request = urllib.request.Request(address)
        if endpoint.authorization:  # unredirected: a redirect to another server must not get the credentials
            request.add_unredirected_header("Authorization", endpoint.authorization)
        # Without HTTP_PROXY: kfp's client ignores it too, and the probe must take the way of the client.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_PROBE_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            fix = "give a valid bearer token in the variable KFP_TOKEN, or user and password in --endpoint"
        raise EngineError(
            f"The endpoint responded with HTTP status {error.code}", where=address, fix=fix
        ) from error
    except ValueError as error:
        raise EngineError("The endpoint is not a Kubeflow Pipelines API", where=address, fix=fix) from error
    except (OSError, http.client.HTTPException) as error:
        reason = hidden(str(getattr(error, "reason", error)))
        raise EngineError(f"The endpoint cannot be reached ({reason})", where=address, fix=fix) from error


def _client(endpoint: Endpoint, namespace: str | None) -> Any:
    import kfp
    from kfp.client.token_credentials_base import TokenCredentialsBase

    scheme, _, words = endpoint.authorization.partition(" ")

    class Basic(TokenCredentialsBase):
        """HTTP Basic authentication for kfp's client, which supports bearer tokens only."""

        def refresh_api_key_hook(self, config: Any) -> None:
            # kfp sets the prefix "Bearer" once; the generated client calls this hook before every request.
            config.api_key["authorization"], config.api_key_prefix["authorization"] = words, scheme

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp's deprecations, on which a user cannot act
        return kfp.Client(
            host=endpoint.address,
            namespace=namespace or "kubeflow",
            existing_token=words if scheme == "Bearer" else None,
            credentials=Basic() if scheme == "Basic" else None,
        )


def _upload(client: Any, package: Package, namespace: str | None) -> tuple[str, str]:
    """Pipeline id and version id of the package on the endpoint; uploads it if it is missing."""
    listed = client.list_pipelines(filter=_named(package.name), namespace=namespace).pipelines
    if not listed:
        pipeline = client.upload_pipeline(str(package.path), package.name, namespace=namespace)
        # This upload also creates the first version, but returns the pipeline only.
        newest = client.list_pipeline_versions(pipeline.pipeline_id, sort_by="created_at desc")
        return pipeline.pipeline_id, newest.pipeline_versions[0].pipeline_version_id
    pipeline_id = listed[0].pipeline_id
    name = f"{package.name}-{file_digest(package.path)[:12]}"
    versions = client.list_pipeline_versions(pipeline_id, filter=_named(name)).pipeline_versions
    version = (
        versions[0]
        if versions
        else client.upload_pipeline_version(str(package.path), name, pipeline_id=pipeline_id)
    )
    return pipeline_id, version.pipeline_version_id


def _named(name: str) -> str:
    # Filter message of the v2beta1 API; operation 1 is EQUALS.
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def _wait(client: Any, run_id: str, url: str, poll_seconds: float, timeout_hours: float) -> Any:
    """Poll until the run has ended."""
    # Not kfp's wait_for_run_completion: its list of final states (2.17) lacks CANCELED, so it never returns
    # from a cancelled run.
    deadline = time.monotonic() + timeout_hours * 3600
    while True:
        run = client.get_run(run_id)
        if run.state in _ENDED:
            break
        if time.monotonic() > deadline:
            raise EngineError(
                f"The run has not ended within {timeout_hours:g} hours; it continues",
                where=url,
                fix="open the run's page",
            )
        time.sleep(poll_seconds)
    if run.state != _SUCCEEDED:
        reason = f": {run.error.message}" if getattr(run, "error", None) and run.error.message else ""
        raise EngineError(
            f"The run ended as {run.state}{reason}",
            where=url,
            fix="open the log of the failed task there, correct the cause, submit again (finished stages are "
            "cached)",
        )
    return run


@contextlib.contextmanager
def _client_errors(endpoint: str) -> Iterator[None]:
    """Convert the client's errors to EngineError, and discard what it prints to stdout."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        # kfp prints a link after each call; with --json our stdout must be JSON only.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise EngineError(
            f"The endpoint refused the request ({error.status} {error.reason}{_detail(error.body)})",
            where=endpoint,
            fix="check namespace, permissions and names; give --token where the endpoint requires one",
        ) from error
    except HTTPError as error:
        raise EngineError(
            # The type only: urllib3's message repeats the address.
            f"The connection failed ({type(error).__name__})",
            where=endpoint,
            fix="look at the endpoint's list of runs (one may have started), then try again",
        ) from error


def _detail(body: Any) -> str:
    # The API server answers {"message": ...}, an authenticating proxy before it often {"error": ...}.
    try:
        message = json.loads(body).get("message") or json.loads(body).get("error") or ""
    except (TypeError, ValueError, AttributeError):
        return ""
    return f": {message}"
