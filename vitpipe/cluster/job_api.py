"""TrainJobs and their pods through the official Kubernetes client; its errors as ours.

An error is either final (`EngineError`, `InputError`: no right, no Trainer, a refused job) or passes
(`UnreachableError`: no connection, a broken stream, an overloaded server), and then `Patience` says how long
to go on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitpipe.cluster.train_job import GROUP, NODE, PLURAL, VERSION
from vitpipe.contracts.errors import EngineError, InputError, reason_of

Job = dict[str, Any]
_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Seconds until a connection stands, and between two pieces of an answer. A silent connection may be dead.
_CONNECT, _READ = 10.0, 60.0
# A watch is ended by the server after this time, a silent log by us: both are opened again.
WATCH_SECONDS, _LOG_SECONDS = 300, 120.0
_PASSING = frozenset({0, 408, 429, 500, 502, 503, 504})
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class UnreachableError(EngineError):
    """The Kubernetes API did not answer, or a stream of it broke; the same request may succeed later."""


class ExpiredError(EngineError):
    """A watch cannot go on from its place (410): the state has to be read anew."""


class ExistsError(EngineError):
    """There is an object of this name already (409)."""


class Patience:
    """Pauses of 1, 2, 4, ... 30 seconds between attempts, up to a limit without one success.

    Args:
        limit_seconds: since the last success.
        say: receives one line per failure.
    """

    def __init__(self, limit_seconds: float, say: Callable[[str], None]) -> None:
        self._limit, self._say = limit_seconds, say
        self._pause: float = _FIRST_PAUSE
        self._failing_since: float | None = None

    def succeed(self) -> None:
        """Note an answer: pauses and limit begin anew."""
        self._pause, self._failing_since = _FIRST_PAUSE, None

    def wait(self, error: EngineError) -> None:
        """Pause after a failure.

        Raises:
            EngineError: the limit is over.
        """
        now = time.monotonic()
        since = self._failing_since = self._failing_since or now
        if now + self._pause - since > self._limit:
            raise EngineError(
                f"The Kubernetes API has not answered for {self._limit:.0f} s ({error.what}); a job that was "
                "made goes on",
                where=error.where,
                fix="run the same command again: it adopts the job",
            ) from error
        self._say(f"{error.what}; trying again in {self._pause:.0f} s")
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class JobApi:
    """The TrainJobs of one namespace.

    Inside a pod the pod's own account is used, elsewhere the file that KUBECONFIG names.

    Args:
        namespace: empty for the pod's own, or that of the current context.

    Raises:
        InputError: the client is not installed, or there is no cluster to talk to.
    """

    def __init__(self, namespace: str = "") -> None:
        try:
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise InputError(
                "The Kubernetes client is not installed",
                where="vitpipe launch",
                fix="install vitpipe with its extra: pip install 'vitpipe[cluster]'",
            ) from error
        own = "default"
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config()
                own = _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
            else:
                file = os.environ.get("KUBECONFIG") or None  # the client reads it only once, when imported
                config.load_kube_config(config_file=file)
                own = config.list_kube_config_contexts(file)[1]["context"].get("namespace", own)
        except (config.ConfigException, OSError) as error:
            raise InputError(
                f"No Kubernetes cluster is configured ({reason_of(error)})",
                where="KUBECONFIG",
                fix="run this in a pod, or let KUBECONFIG name a file with access to the cluster",
            ) from error
        self.namespace = namespace or own
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # `Patience` does that, and says so
        connection = client.ApiClient(settings)
        self._objects, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def create(self, job: Job) -> Job:
        """Create a job.

        Raises:
            ExistsError: there is one of its name.
            UnreachableError, EngineError, InputError: see the module's docstring.
        """
        placed = {**job, "metadata": {**job["metadata"], "namespace": self.namespace}}
        with self._errors("create TrainJobs"):
            return self._objects.create_namespaced_custom_object(
                *self._kind, placed, _request_timeout=(_CONNECT, _READ)
            )

    def find(self, name: str) -> tuple[Job | None, str]:
        """A job, or None, and the place from which its changes can be watched.

        Raises:
            UnreachableError, EngineError: see the module's docstring.
        """
        with self._errors("list TrainJobs"):
            found = self._objects.list_namespaced_custom_object(
                *self._kind, field_selector=f"metadata.name={name}", _request_timeout=(_CONNECT, _READ)
            )
            # Not every server knows the selector.
            jobs = [job for job in found["items"] if job["metadata"]["name"] == name]
            return (jobs[0] if jobs else None), str(found["metadata"].get("resourceVersion", ""))

    def changes(self, name: str, since: str, seconds: float) -> Iterator[tuple[str, Job]]:
        """Kind of change (ADDED, MODIFIED, DELETED) and the job after it; ends when the server ends it.

        Args:
            since: the place, from `find`.
            seconds: at most.

        Raises:
            ExpiredError: the place is too old.
            UnreachableError, EngineError: see the module's docstring.
        """
        from kubernetes import watch

        with self._errors("watch TrainJobs"):
            stream = watch.Watch().stream(
                self._objects.list_namespaced_custom_object,
                *self._kind,
                field_selector=f"metadata.name={name}",
                resource_version=since,
                timeout_seconds=max(1, int(seconds)),
                # The server ends a watch by itself; a connection without an end has been lost.
                _request_timeout=(_CONNECT, seconds + _READ),
            )
            for event in stream:
                job = event["raw_object"]
                if event["type"] != "BOOKMARK" and job["metadata"]["name"] == name:
                    yield event["type"], job

    def delete(self, name: str, uid: str) -> None:
        """Delete a job with all that belongs to it, unless another has taken its name.

        Raises:
            UnreachableError, EngineError: see the module's docstring.
        """
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        try:
            with self._errors("delete TrainJobs", is_missing_final=False):
                self._objects.delete_namespaced_custom_object(
                    *self._kind, name, body=body, _request_timeout=(_CONNECT, _READ)
                )
        except (ExistsError, LookupError):
            return  # it is gone, or the name belongs to another by now

    def pods(self, name: str) -> list[Any]:
        """The pods of a job's nodes, oldest first.

        Raises:
            UnreachableError, EngineError: see the module's docstring.
        """
        labels = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        with self._errors("list pods"):
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=labels, _request_timeout=(_CONNECT, _READ)
            )
            return sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp)

    def log(self, pod: str, since_seconds: int | None) -> Iterator[str]:
        """The lines of a pod's log as they are written, each with its time in front, until the pod ends.

        Raises:
            UnreachableError, EngineError: see the module's docstring; so is a pod that has not begun.
        """
        from kubernetes.watch.watch import iter_resp_lines

        given = {} if since_seconds is None else {"since_seconds": since_seconds}
        with self._errors("read logs of pods", passing=_PASSING | {400, 404}):
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=NODE,
                follow=True,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(_CONNECT, _LOG_SECONDS),
                **given,
            )
            try:
                yield from iter_resp_lines(answer)
            finally:
                answer.close()
                answer.release_conn()

    @property
    def _kind(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    @contextmanager
    def _errors(
        self, right: str, *, passing: frozenset[int] = _PASSING, is_missing_final: bool = True
    ) -> Iterator[None]:
        """Turn the client's errors into those of the module's docstring.

        Args:
            right: what the account must be allowed to do, for the message.
            passing: HTTP statuses that may pass.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            status, said = int(error.status or 0), _said(error)
            where = f"namespace {self.namespace}"
            if status == 410:
                raise ExpiredError(f"The watch has expired ({said})", where=where) from error
            if status == 409:
                raise ExistsError(f"Kubernetes reports a conflict ({said})", where=where) from error
            if status == 404 and not is_missing_final:
                raise LookupError(said) from error
            if status in passing:
                raise UnreachableError(f"Kubernetes answered {status} ({said})", where=where) from error
            if status in (400, 422):
                raise InputError(
                    f"Kubernetes refuses the job ({said})", where=where, fix="correct --job"
                ) from error
            fixes = {
                404: "install Kubeflow Trainer 2.x in the cluster (`kubectl get crd trainjobs."
                "trainer.kubeflow.org`), and check the namespace",
                401: "give the launcher a service account or a KUBECONFIG that the cluster accepts",
            }
            fix = fixes.get(status, f"let the launcher's service account {right}, see docs/several-nodes.md")
            raise EngineError(f"Kubernetes answered {status} ({said})", where=where, fix=fix) from error
        except (HTTPError, OSError, ValueError) as error:
            # ValueError: a line of a stream that was cut off.
            raise UnreachableError(
                f"The Kubernetes API cannot be reached ({reason_of(error)})", where=self._address()
            ) from error

    def _address(self) -> str:
        return str(self._objects.api_client.configuration.host)


def _said(error: Any) -> str:
    """The API's own message, or the reason of its status."""
    try:
        text = str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        text = str(error.reason or "")
    return " ".join(text.split())[:300]
