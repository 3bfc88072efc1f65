"""Send a package to a Kubeflow endpoint, start a run and, if asked, wait for its real end.

The same by Kubeflow's own command, without a version of the pipeline being kept:

    kfp --endpoint URL run create --experiment-name vitpipe --package-file build/pipeline.yaml

Its `--wait` exits with 0 for a failed run; `vitpipe submit --wait` exits with 1.
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

from pipelines.compile import Package, check_arguments, validate_package
from vitpipe.config.digest import file_digest
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import EngineError, InputError

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
    authorization: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str, token: str | None = None) -> Endpoint:
        """From an address, perhaps with user and password, or with a bearer token.

        Raises:
            InputError: when it is no such address, or has credentials beside a token.
        """
        try:
            parts = urlsplit(text)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_address = is_address and parts.port != 0 and not (parts.query or parts.fragment)
            is_address = is_address and text.isprintable() and " " not in text
        except ValueError:  # of the port
            is_address = False
        if not is_address:
            raise InputError(
                f"'{text}' is no address of an API",
                where="--endpoint",
                fix="write http://host:port or https://host/path; in a password / is %2F, @ is %40",
            )
        user, at, place = parts.netloc.rpartition("@")
        if at and token:
            raise InputError(
                "There are two credentials: a bearer token and those in the address",
                where="--endpoint, --token",
                fix="give one of them; the token may come from the variable KFP_TOKEN",
            )
        words = base64.b64encode(unquote(user).encode()).decode()
        header = f"Basic {words}" if at else f"Bearer {token}" if token else ""
        return cls(parts._replace(netloc=place).geturl().rstrip("/"), header)


@dataclass(frozen=True)
class Submission:
    """A run on an endpoint. `state` is Kubeflow's own word for it, `url` the page that shows it."""

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
    """Upload the package as its pipeline's version, start a run, perhaps wait.

    The version is named after the package's content, so sending the same package again adds nothing.

    Args:
        package_path: a compiled package.
        endpoint: address of the Kubeflow Pipelines API, for example http://localhost:8080; user and password
            in it are sent as HTTP's basic credentials and shown nowhere.
        arguments: pipeline parameters of this run.
        experiment: name of the experiment; made when missing.
        namespace: for an endpoint with many users.
        token: bearer token, if the endpoint asks for one.
        service_account: Kubernetes service account of the run's pods.
        wait: come back when the run has ended.

    Raises:
        InputError: the package is wrong or has no such parameter, or `endpoint` is no such address.
        EngineError: the endpoint cannot be reached or refuses, or the run did not succeed.
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
        url = f"{api.address}/#/runs/details/{run.run_id}"
        if wait:
            run = _wait(client, run.run_id, url, poll_seconds, timeout_hours)
    return Submission(run.run_id, url, run.state or "PENDING", pipeline_id, version_id)


def _probe(endpoint: Endpoint) -> None:
    """Ask for the endpoint's health before kfp is imported: its client retries for long and talks a lot."""
    address = f"{endpoint.address}/apis/v2beta1/healthz"
    fix = (
        "check the address; from outside the cluster forward it first: "
        "kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80, then --endpoint http://localhost:8080"
    )
    try:
        request = urllib.request.Request(address)
        if endpoint.authorization:  # not for another server that this one may redirect to
            request.add_unredirected_header("Authorization", endpoint.authorization)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_PROBE_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            fix = "give a valid bearer token by the variable KFP_TOKEN, or user and password in --endpoint"
        raise EngineError(f"The endpoint answers {error.code}", where=address, fix=fix) from error
    except ValueError as error:
        raise EngineError("This is no Kubeflow Pipelines API", where=address, fix=fix) from error
    except (OSError, http.client.HTTPException) as error:
        reason = hidden(str(getattr(error, "reason", error)))
        raise EngineError(f"The endpoint cannot be reached ({reason})", where=address, fix=fix) from error


def _client(endpoint: Endpoint, namespace: str | None) -> Any:
    import kfp
    from kfp.client.token_credentials_base import TokenCredentialsBase

    kind, _, words = endpoint.authorization.partition(" ")

    class Basic(TokenCredentialsBase):
        """Sets the header before every request; without that the client knows bearer tokens only."""

        def refresh_api_key_hook(self, config: Any) -> None:
            config.api_key["authorization"], config.api_key_prefix["authorization"] = words, kind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kfp.Client(
            host=endpoint.address,
            namespace=namespace or "kubeflow",
            existing_token=words if kind == "Bearer" else None,
            credentials=Basic() if kind == "Basic" else None,
        )


def _upload(client: Any, package: Package, namespace: str | None) -> tuple[str, str]:
    """Pipeline and version id of the package on the endpoint; uploaded if it is not there."""
    listed = client.list_pipelines(filter=_named(package.name), namespace=namespace).pipelines
    if not listed:
        pipeline = client.upload_pipeline(str(package.path), package.name, namespace=namespace)
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
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def _wait(client: Any, run_id: str, url: str, poll_seconds: float, timeout_hours: float) -> Any:
    """Poll until the run has ended; kfp's own wait never comes back from a cancelled run."""
    deadline = time.monotonic() + timeout_hours * 3600
    while True:
        run = client.get_run(run_id)
        if run.state in _ENDED:
            break
        if time.monotonic() > deadline:
            raise EngineError(
                f"The run has not ended within {timeout_hours:g} hours; it goes on",
                where=url,
                fix="look there",
            )
        time.sleep(poll_seconds)
    if run.state != _SUCCEEDED:
        reason = f": {run.error.message}" if getattr(run, "error", None) and run.error.message else ""
        raise EngineError(
            f"The run ended as {run.state}{reason}",
            where=url,
            fix="open the failing task's log there, fix it, submit again: finished stages are cached",
        )
    return run


@contextlib.contextmanager
def _client_errors(endpoint: str) -> Iterator[None]:
    """Silence the client's links on stdout, turn its errors into ours."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise EngineError(
            f"The endpoint refused the request ({error.status} {error.reason}{_detail(error.body)})",
            where=endpoint,
            fix="check namespace, rights and names; `--token` where the endpoint asks who you are",
        ) from error
    except HTTPError as error:
        raise EngineError(
            f"The connection broke ({type(error).__name__})",
            where=endpoint,
            fix="try again; a run may have started",
        ) from error


def _detail(body: Any) -> str:
    try:
        message = json.loads(body).get("message") or json.loads(body).get("error") or ""
    except (TypeError, ValueError, AttributeError):
        return ""
    return f": {message}"
