"""The part of a Kubernetes API that a launcher uses, on the loopback: TrainJobs with watches, pods, logs.

A test scripts what goes wrong: `fail(kind, ...)` for the next requests of a kind (create, list, watch, delete,
pods, log), and plays the controller by `update`, `put_pod` and `write_log`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

DROP = "drop"  # the connection breaks instead of an answer, or in the middle of a stream
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/vit/trainjobs"
PODS = "/api/v1/namespaces/vit/pods"


class KubeDouble:
    """The state of the double; every method may be called from any thread."""

    def __init__(self):
        self.jobs, self.pods, self.logs = {}, {}, {}
        self.requests = []  # (kind, path with query)
        self.bodies = []
        self.on_create = None
        self._events, self._version, self._oldest = [], 100, 100
        self._faults = {}
        self.changed = threading.Condition()
        double = self

        class Handler(_Handler):
            kube = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.is_closing = False
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self.is_closing = True
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path):
        """A KUBECONFIG for this server, namespace `vit`."""
        context = {"cluster": "double", "user": "me", "namespace": "vit"}
        values = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "double", "cluster": {"server": self.address}}],
            "users": [{"name": "me", "user": {"token": "secret-token"}}],
            "contexts": [{"name": "here", "context": context}],
        }  # fmt: skip
        path.write_text(json.dumps(values))
        return path

    def fail(self, kind, *actions):
        """What the next requests of a kind get: a status, `DROP`, or None for the real answer."""
        self._faults.setdefault(kind, deque()).extend(actions)

    def next_fault(self, kind):
        waiting = self._faults.get(kind)
        return waiting.popleft() if waiting else None

    def count(self, kind):
        return sum(found == kind for found, _ in self.requests)

    def wait_for(self, is_there, seconds=90):
        """Block until something is so."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, self.requests[-10:]
            time.sleep(0.01)

    def create(self, job):
        name = job["metadata"]["name"]
        with self.changed:
            if name in self.jobs:
                return 409, _status(409, "AlreadyExists", f'trainjobs "{name}" already exists')
            meta = {"uid": f"uid-{self._version}", "creationTimestamp": _now(), "generation": 1}
            self.jobs[name] = {**job, "metadata": {**job["metadata"], **meta}}
            made = self._note("ADDED", name)
        if self.on_create:
            threading.Thread(target=self.on_create, args=(name,), daemon=True).start()
        return 201, made

    def update(self, name, *, deletion=False, **status):
        """Change a job's status as the controller does."""
        with self.changed:
            job = self.jobs[name]
            job["status"] = {**job.get("status", {}), **status}
            if deletion:
                job["metadata"]["deletionTimestamp"] = _now()
            self._note("MODIFIED", name)

    def condition(self, name, kind, status="True", reason="", message=""):
        """Set one condition of a job."""
        others = [c for c in self.jobs[name].get("status", {}).get("conditions", []) if c["type"] != kind]
        found = {"type": kind, "status": status, "reason": reason, "message": message}
        self.update(name, conditions=[*others, {**found, "lastTransitionTime": _now()}])

    def at_work(self, name, ready=1, failed=0):
        counts = {"ready": ready, "active": 1, "succeeded": 0, "failed": failed, "suspended": 0}
        self.update(name, jobsStatus=[{"name": "node", **counts}])

    def remove(self, name):
        with self.changed:
            self._note("DELETED", name)
            del self.jobs[name]

    def forget_events(self):
        """All earlier versions are too old to watch from, as after a compaction of etcd."""
        with self.changed:
            self._events.clear()
            self._version += 1
            self._oldest = self._version

    def put_pod(self, name, job, index=0, phase="Running", conditions=(), exit_code=None, reason="Error"):
        """Make or change a pod of a job's node."""
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        state = {"running": {"startedAt": _now()}}
        if exit_code is not None:
            state = {"terminated": {"exitCode": exit_code, "reason": reason}}
        created = self.pods.get(name, {}).get("metadata", {}).get("creationTimestamp") or _now()
        container = {
            "name": "node", "state": state, "image": "i", "imageID": "i", "ready": True, "restartCount": 0,
        }  # fmt: skip
        with self.changed:
            self.pods[name] = {
                "metadata": {
                    "name": name,
                    "uid": f"uid-{name}",
                    "labels": labels,
                    "creationTimestamp": created,
                },
                "spec": {"containers": [{"name": "node"}]},
                "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": [container]},
            }
            self.logs.setdefault(name, [])
            self.changed.notify_all()

    def write_log(self, pod, *lines):
        with self.changed:
            self.logs[pod] += [(_now(), line) for line in lines]
            self.changed.notify_all()

    def _note(self, kind, name):
        self._version += 1
        job = self.jobs[name]
        job["metadata"]["resourceVersion"] = str(self._version)
        job = json.loads(json.dumps(job))
        self._events.append((self._version, kind, job))
        self.changed.notify_all()
        return job

    def listed(self):
        with self.changed:
            # As a server that does not know the selector: all jobs.
            return {"metadata": {"resourceVersion": str(self._version)}, "items": list(self.jobs.values())}

    def events_after(self, version):
        """Events later than a version; None when it is too old."""
        if version < self._oldest:
            return None
        return [event for event in self._events if event[0] > version]


class _Handler(BaseHTTPRequestHandler):
    kube: KubeDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Not on the terminal of the tests."""

    def _kind(self, path, query):
        if path.startswith(JOBS):
            if self.command == "GET":
                return "watch" if query.get("watch") else "list"
            return {"POST": "create", "DELETE": "delete"}[self.command]
        return "log" if path.endswith("/log") else "pods"

    def _serve(self):
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        kind = self._kind(url.path, query)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.kube.requests.append((kind, self.path))
        self.kube.bodies.append((kind, body))
        fault = self.kube.next_fault(kind)
        if fault == DROP and kind not in ("watch", "log"):
            self._drop()
        elif isinstance(fault, int) and not (kind == "watch" and fault == 410):
            self._answer(fault, _status(fault, "Fault", f"the test asked for {fault}"))
        else:
            getattr(self, f"_{kind}")(url.path, query, body, fault)

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815

    def _create(self, path, query, body, fault):
        self._answer(*self.kube.create(body))

    def _list(self, path, query, body, fault):
        self._answer(200, {"kind": "TrainJobList", **self.kube.listed()})

    def _delete(self, path, query, body, fault):
        name = path.rsplit("/", 1)[1]
        job = self.kube.jobs.get(name)
        if job is None:
            self._answer(404, _status(404, "NotFound", f"{name} not found"))
        elif (body or {}).get("preconditions", {}).get("uid") not in (None, job["metadata"]["uid"]):
            self._answer(409, _status(409, "Conflict", "the UID in the precondition does not match"))
        else:
            self.kube.remove(name)
            self._answer(200, _status(200, "", ""))

    def _pods(self, path, query, body, fault):
        wanted = dict(part.split("=") for part in query["labelSelector"].split(","))
        pods = [pod for pod in self.kube.pods.values() if wanted.items() <= pod["metadata"]["labels"].items()]
        self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods})

    def _watch(self, path, query, body, fault):
        since = int(query["resourceVersion"])
        until = time.monotonic() + float(query["timeoutSeconds"])
        self._begin()
        while time.monotonic() < until and not self.kube.is_closing:
            with self.kube.changed:
                events = None if fault == 410 else self.kube.events_after(since)
                if not events and events is not None and fault != DROP:
                    self.kube.changed.wait(0.2)
            if events is None:
                gone = _status(410, "Expired", "too old resource version")
                self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
                break
            if fault == DROP:
                self._chunk('{"type": "MODIFIED", "object": {"metadata"')  # in the middle of a line
                return self._drop()
            for version, kind, job in events:
                since = version
                self._chunk(json.dumps({"type": kind, "object": job}) + "\n")
        return self._chunk("")

    def _log(self, path, query, body, fault):
        pod = path.split("/")[-2]
        if pod not in self.kube.pods:
            return self._answer(404, _status(404, "NotFound", f"pods {pod} not found"))
        self._begin()
        sent = 0
        while not self.kube.is_closing:
            with self.kube.changed:
                lines = self.kube.logs[pod][sent:]
                is_over = pod not in self.kube.pods or self.kube.pods[pod]["status"]["phase"] != "Running"
                if not lines and not is_over:
                    self.kube.changed.wait(0.2)
            for moment, line in lines:
                self._chunk(f"{moment} {line}\n")
                sent += 1
                if fault == DROP:
                    return self._drop()
            if is_over and not lines:
                break
        return self._chunk("")

    def _begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text):
        data = text.encode()
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:  # the launcher has gone
            self.close_connection = True

    def _drop(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _answer(self, status, values):
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _status(code, reason, message):
    return {
        "kind": "Status", "apiVersion": "v1", "status": "Failure" if code >= 400 else "Success",
        "code": code, "reason": reason, "message": message,
    }  # fmt: skip


def _now():
    # As the kubelet: up to nine decimals without trailing zeros.
    text = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return text.rstrip("0").rstrip(".") + "Z"
