"""A git server on the loopback interface with HTTP basic authentication in front of `git http-backend`."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class GitServer:
    """Serves all repositories in a folder to one user."""

    def __init__(self, root: Path, user: str, password: str) -> None:
        self.root = root
        self.authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> GitServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(
        self, method: str, path: str, body: bytes, headers
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        # Clients send credentials only after this challenge.
        if headers.get("Authorization") != self.authorization:
            return 401, [("WWW-Authenticate", 'Basic realm="git"')], b""
        parts = urlsplit(path)
        # The CGI variables of RFC 3875 that http-backend reads, and git's own for protocol version 2.
        environment = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": method,
            "PATH_INFO": parts.path,
            "QUERY_STRING": parts.query,
            "CONTENT_TYPE": headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": headers.get("Git-Protocol", ""),
        }
        done = subprocess.run(
            ["git", "http-backend"], input=body, env=environment, capture_output=True, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        lines = [line.partition(": ")[::2] for line in head.decode().split("\r\n")]
        # A CGI program states the status in a header; without one it is 200.
        status = next((int(value.split()[0]) for name, value in lines if name == "Status"), 200)
        return status, [line for line in lines if line[0] != "Status"], content

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self._body()
                status, headers, content = server.answer(self.command, self.path, body, self.headers)
                self.send_response(status)
                for name, value in (*headers, ("Content-Length", str(len(content)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                # git sends large requests in chunks, which http.server does not decode.
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_POST = _serve  # noqa: N815  (the names are http.server's)

            def log_message(self, *_) -> None:
                pass

        return Handler
