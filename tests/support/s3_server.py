"""An S3 server (moto) on the loopback interface, behind a proxy that counts requests and injects faults."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vitpipe.data.storage import s3 as s3_module

# In a separate process: loader workers are forked from the test process, and would copy a server thread's locks.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@dataclass
class Gate:
    """State of the proxy.

    Attributes:
        counts: requests by method; a GET with a Range header is counted as RANGE.
        together: if set, range requests wait for each other here; sequential ones time out and fail.
        faults: faults for the next requests of a kind in `fault_at`: 500, SlowDown, short, reset, corrupt.
    """

    address: str
    counts: Counter = field(default_factory=Counter)
    faults: deque = field(default_factory=deque)
    fault_at: tuple[str, ...] = ("RANGE",)
    together: threading.Barrier | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kind(self, method: str, headers) -> str:
        return "RANGE" if method == "GET" and "Range" in headers else method

    def next_fault(self, kind: str) -> str:
        with self.lock:
            self.counts[kind] += 1
            return self.faults.popleft() if kind in self.fault_at and self.faults else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: with Nagle's algorithm and delayed ACKs, each answer takes 40 ms.
    disable_nagle_algorithm = True
    gate: Gate
    port: int

    def _pass_on(self) -> None:
        fault = self.gate.next_fault(self.gate.kind(self.command, self.headers))
        if self.gate.together is not None and "Range" in self.headers:
            self.gate.together.wait(10)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "reset":
            self.close_connection = True
            return
        if fault in ("500", "SlowDown"):
            status, code = (500, "InternalError") if fault == "500" else (503, "SlowDown")
            answer = f"<Error><Code>{code}</Code><Message>later</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, answer, len(answer))
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        headers = {k: v for k, v in response.getheaders() if k not in ("Connection", "Transfer-Encoding")}
        length = int(headers.pop("Content-Length", len(content)))
        if fault == "short":
            content, self.close_connection = content[: len(content) // 2], True
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(response.status, headers, content, length)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Ignore errors: clients close the connection after a fault."""


@contextmanager
def gate_to(port: int) -> Iterator[Gate]:
    gate = Gate("")
    handler = type("Handler", (_Handler,), {"gate": gate, "port": port})
    server = _Server(("127.0.0.1", 0), handler)
    gate.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield gate
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of the server; it stops with the session, or when its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


@pytest.fixture(scope="session")
def s3_gate(s3_port, tmp_path_factory) -> Iterator[tuple[Gate, dict[str, str]]]:
    """The proxy and the environment variables for it; one per session, since tests share a cached client."""
    no_settings = tmp_path_factory.mktemp("aws") / "empty"
    no_settings.touch()
    with gate_to(s3_port) as gate:
        variables = {
            "AWS_ENDPOINT_URL": gate.address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(no_settings),
            "AWS_SHARED_CREDENTIALS_FILE": str(no_settings),
        }
        yield gate, variables


@pytest.fixture
def s3(s3_gate, s3_port, tmp_path, monkeypatch) -> Gate:
    """A proxy to a server with one empty bucket, `shards`, and an empty cache."""
    gate, variables = s3_gate
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITPIPE_CACHE_GB", raising=False)
    monkeypatch.setattr(s3_module, "_FIRST_PAUSE_SECONDS", 0.001)
    gate.faults.clear()
    gate.fault_at, gate.together = ("RANGE",), None
    reset = http.client.HTTPConnection("127.0.0.1", s3_port, timeout=30)
    reset.request("POST", "/moto-api/reset")
    reset.getresponse().read()
    reset.close()
    s3_module._client().create_bucket(Bucket="shards")
    gate.counts.clear()
    return gate
