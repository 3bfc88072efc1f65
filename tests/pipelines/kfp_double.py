"""A small Kubeflow Pipelines API, v2beta1: it keeps what it is sent and refuses bodies that are not right."""

from __future__ import annotations

import email
import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml

BASE = "/apis/v2beta1"
# Body of a request -> allowed keys with their types.
EXPERIMENT = {"display_name": str, "namespace": str, "description": str}
RUN = {
    "experiment_id": str,
    "display_name": str,
    "pipeline_version_reference": dict,
    "pipeline_spec": dict,
    "runtime_config": dict,
    "service_account": str,
}


class RefusedError(Exception):
    """A body or query that the real API would refuse."""


class KfpDouble:
    """The server.

    Attributes:
        states: what a run reports one after the other; the last one stays.
        token, authorization, cookie: what every request must have; `tokens` are those that it had.
        login_page: where requests without them are sent, as Dex and IAP do.

    Args:
        certificate: PEM file with a certificate and its key: HTTPS.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.error = ""
        self.token = ""
        self.authorization = ""
        self.cookie = ""
        self.login_page = ""
        self.tokens: list[str] = []
        self.refuse_runs = False
        self.experiments: list[dict] = []
        self.pipelines: list[dict] = []
        self.versions: list[dict] = []
        self.runs: list[dict] = []
        self.polls = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> KfpDouble:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def answer(self, method: str, path: str, query: dict, body: bytes, headers) -> dict:
        wanted = f"Bearer {self.token}" if self.token else self.authorization
        self.tokens.append(headers.get("Authorization") or "")
        if wanted and headers.get("Authorization") != wanted:
            raise PermissionError
        if self.cookie and headers.get("Cookie") != self.cookie:
            raise PermissionError
        routes = [
            ("GET", r"/healthz", lambda: {"multi_user": False}),
            ("GET", r"/experiments", lambda: {"experiments": self._find(self.experiments, query)}),
            ("POST", r"/experiments", lambda: self._add_experiment(checked(body, EXPERIMENT))),
            ("GET", r"/pipelines", lambda: {"pipelines": self._find(self.pipelines, query)}),
            ("POST", r"/pipelines/upload", lambda: self._upload(query, body, headers)),
            ("POST", r"/pipelines/upload_version", lambda: self._upload_version(query, body, headers)),
            (
                "GET",
                r"/pipelines/([^/]+)/versions",
                lambda: {"pipeline_versions": self._find(self.versions, query)},
            ),
            ("POST", r"/runs", lambda: self._add_run(checked(body, RUN))),
            ("GET", r"/runs/([^/]+)", self._poll),
        ]
        for verb, pattern, reply in routes:
            if verb == method and re.fullmatch(BASE + pattern, path):
                return reply()
        raise LookupError(f"{method} {path}")

    def _find(self, things: list[dict], query: dict) -> list[dict]:
        if "filter" not in query:
            return things
        found = things
        for predicate in json.loads(query["filter"][0])["predicates"]:
            if predicate["operation"] not in (1, "EQUALS") or predicate["key"] not in (
                "display_name",
                "name",
            ):
                raise RefusedError(f"filter {predicate}")
            value = predicate.get("stringValue", predicate.get("string_value"))
            found = [thing for thing in found if thing["display_name"] == value]
        return found

    def _add_experiment(self, body: dict) -> dict:
        self.experiments.append({**body, "experiment_id": f"e{len(self.experiments)}"})
        return self.experiments[-1]

    def _upload(self, query: dict, body: bytes, headers) -> dict:
        name = query["name"][0]
        if any(p["display_name"] == name for p in self.pipelines):
            raise RefusedError(f"a pipeline {name} exists")
        self.pipelines.append({"pipeline_id": f"p{len(self.pipelines)}", "display_name": name})
        self._add_version(self.pipelines[-1]["pipeline_id"], name, package_in(body, headers))
        return self.pipelines[-1]

    def _upload_version(self, query: dict, body: bytes, headers) -> dict:
        pipeline_id, name = query["pipelineid"][0], query["name"][0]
        if pipeline_id not in [p["pipeline_id"] for p in self.pipelines]:
            raise RefusedError(f"no pipeline {pipeline_id}")
        if any(v["display_name"] == name for v in self.versions):
            raise RefusedError(f"a version {name} exists")
        return self._add_version(pipeline_id, name, package_in(body, headers))

    def _add_version(self, pipeline_id: str, name: str, documents: list) -> dict:
        version = {
            "pipeline_id": pipeline_id,
            "pipeline_version_id": f"v{len(self.versions)}",
            "display_name": name,
            "pipeline_spec": {"pipeline_spec": documents[0]},
        }
        self.versions.append(version)
        return version

    def _add_run(self, body: dict) -> dict:
        if self.refuse_runs:
            raise RefusedError("quota exceeded")
        if body["experiment_id"] not in [e["experiment_id"] for e in self.experiments]:
            raise RefusedError("no such experiment")
        allowed = self._spec_of(body)["root"]["inputDefinitions"]["parameters"]
        for name, value in body.get("runtime_config", {}).get("parameters", {}).items():
            if name not in allowed or isinstance(value, list) != (allowed[name]["parameterType"] == "LIST"):
                raise RefusedError(f"parameter {name}={value!r}")
        self.runs.append(
            {
                **body,
                "run_id": f"r{len(self.runs)}",
                "state": self.states[0],
                "created_at": "2026-01-01T00:00:00Z",
            }
        )
        return self.runs[-1]

    def _spec_of(self, body: dict) -> dict:
        """The pipeline of a run: sent with it, or a version that was uploaded before."""
        if ("pipeline_spec" in body) == ("pipeline_version_reference" in body):
            raise RefusedError("give a pipeline or a version of one")
        if "pipeline_spec" in body:
            return body["pipeline_spec"]["pipeline_spec"]
        reference = body["pipeline_version_reference"]
        for version in self.versions:
            if all(version[key] == value for key, value in reference.items()):
                return version["pipeline_spec"]["pipeline_spec"]
        raise RefusedError(f"no such version {reference}")

    def _poll(self) -> dict:
        self.polls += 1
        state = self.states[min(self.polls, len(self.states) - 1)]
        error = {"error": {"code": 13, "message": self.error}} if self.error else {}
        return {**self.runs[-1], "state": state, **error}

    def _handler(self):
        double = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    reply = double.answer(self.command, parts.path, parse_qs(parts.query), body, self.headers)
                    code = 200
                except RefusedError as error:
                    code, reply = 400, {"code": 3, "message": str(error)}
                except PermissionError:
                    code, reply = 302 if double.login_page else 401, {"code": 16, "message": "who are you"}
                except LookupError as error:
                    code, reply = 404, {"code": 5, "message": str(error)}
                data = json.dumps(reply).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", double.login_page)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve  # noqa: N815  (the names are http.server's)

            def log_message(self, *_) -> None:
                pass

        return Handler


def checked(body: bytes, allowed: dict) -> dict:
    """The body, if it holds only known keys of the right type."""
    found = json.loads(body)
    for key, value in found.items():
        if key not in allowed or not isinstance(value, allowed[key]):
            raise RefusedError(f"field {key}={value!r}")
    return found


def package_in(body: bytes, headers) -> list:
    """The YAML documents in the multipart field `uploadfile`."""
    message = email.message_from_bytes(
        b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
    )
    for part in message.get_payload():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            return [d for d in yaml.safe_load_all(part.get_payload(decode=True)) if d]
    raise RefusedError("no field uploadfile")
