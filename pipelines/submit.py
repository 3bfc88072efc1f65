"""Upload a package to a Kubeflow endpoint, start a run and optionally wait for its final state.

The same with Kubeflow's own command, which stores no version of the pipeline:

    kfp --endpoint URL run create --experiment-name vitpipe --package-file build/pipeline.yaml

Its `--wait` exits with code 0 for a failed run; `vitpipe submit --wait` exits with code 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.endpoint import Endpoint, Login, probe
from pipelines.package import Package, check_arguments, validate_package
from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import EngineError

# The final ones of the v2beta1 API's RuntimeState.
_SUCCEEDED = "SUCCEEDED"
_ENDED = {_SUCCEEDED, "FAILED", "SKIPPED", "CANCELED", "ERROR"}


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
    login: Login | None = None,
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
        login: token, cookies, client ID or certificate, where the endpoint requires them.
        service_account: Kubernetes service account of the run's pods.
        wait: return when the run has ended.
        poll_seconds: time between two requests for the run's state.
        timeout_hours: longest wait; 14 days by default. The run itself is not stopped.

    Raises:
        InputError: the package is invalid or has no such parameter, `endpoint` is not an API address, or the
            login cannot be used.
        EngineError: the endpoint cannot be reached or refuses the request, or the run did not succeed.
    """
    package = validate_package(package_path)
    check_arguments(package, arguments or {})
    api = Endpoint.of(endpoint, login)
    probe(api)
    with _client_errors(api):
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


def _client(endpoint: Endpoint, namespace: str | None) -> Any:
    import kfp
    from kfp.client.token_credentials_base import TokenCredentialsBase

    class Current(TokenCredentialsBase):
        """The endpoint's login before every request; kfp's client itself supports constant tokens only."""

        def refresh_api_key_hook(self, config: Any) -> None:
            # kfp sets the prefix "Bearer" once; the generated client calls this hook before every request.
            prefix, words = endpoint.authorization()
            config.api_key["authorization"], config.api_key_prefix["authorization"] = words, prefix

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp's deprecations, on which a user cannot act
        return kfp.Client(
            host=endpoint.address,
            namespace=namespace or "kubeflow",
            credentials=Current() if endpoint.authorization()[0] else None,
            cookies=endpoint.login.cookies,
            ssl_ca_cert=str(endpoint.login.ca_file) if endpoint.login.ca_file else None,
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
def _client_errors(endpoint: Endpoint) -> Iterator[None]:
    """Convert the client's errors to EngineError, and discard what it prints to stdout."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        # kfp prints a link after each call; with --json our stdout must be JSON only.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        fix = "check namespace, permissions and names"
        raise EngineError(
            f"The endpoint refused the request ({error.status} {error.reason}{_detail(error.body)})",
            where=endpoint.address,
            fix=f"{fix}, or {endpoint.advice()}" if error.status in (401, 403) else fix,
        ) from error
    except HTTPError as error:
        raise EngineError(
            # The type only: urllib3's message repeats the address.
            f"The connection failed ({type(error).__name__})",
            where=endpoint.address,
            fix="look at the endpoint's list of runs (one may have started), then try again",
        ) from error


def _detail(body: Any) -> str:
    # The API server answers {"message": ...}, an authenticating proxy before it often {"error": ...}.
    try:
        message = json.loads(body).get("message") or json.loads(body).get("error") or ""
    except (TypeError, ValueError, AttributeError):
        return ""
    return f": {message}"
