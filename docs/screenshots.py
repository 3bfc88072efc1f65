"""Take the pictures of MLflow's pages that the docs show, from runs that are there.

    python docs/screenshots.py sqlite:///mlflow.db docs

Needs Chromium. Starts `mlflow ui` on the loopback interface and stops it. Writes `mlflow-runs.png` (the runs
table as vitpipe opens it), `mlflow-compare.png` (the newest parent runs side by side, four at most) and
`mlflow-stage.png` (the newest fine-tuning).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

_START_SECONDS, _SHOT_SECONDS, _PAGE_MS = 300, 60, 15_000
_WIDTH = 1600
_COMPARED = 4


def main(store: str, folder: Path) -> None:
    """Write the three pictures.

    Args:
        store: tracking URI of a database with finished runs.
    """
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("vitpipe").experiment_id
    parents = client.search_runs([experiment], "tags.`vitpipe.role` = 'pipeline' and status = 'FINISHED'")
    stages = client.search_runs(
        [experiment], "tags.`mlflow.runName` LIKE 'finetune:%' and status = 'FINISHED'"
    )
    ids = quote(json.dumps([run.info.run_id for run in parents[:_COMPARED]]))
    pages = {
        "mlflow-runs": (
            f"experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=vitpipe",
            760,
        ),
        "mlflow-compare": (f"compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}", 1500),
        "mlflow-stage": (f"experiments/{experiment}/runs/{stages[0].info.run_id}", 1100),
    }
    with _served(store) as address:
        for name, (place, height) in pages.items():
            _photograph(f"{address}/#/{place}", folder / f"{name}.png", height)
            print(folder / f"{name}.png")


@contextmanager
def _served(store: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = [
        Path(sys.executable).parent / "mlflow",
        "ui",
        "--backend-store-uri",
        store,
        "--port",
        port,
        "--workers",
        "1",
    ]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                if time.monotonic() > until or server.poll() is not None:
                    raise SystemExit("mlflow ui did not start") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _photograph(address: str, file: Path, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("Chromium is not installed")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        # The page is drawn by scripts that ask the server.
        f"--virtual-time-budget={_PAGE_MS}", "--hide-scrollbars", f"--window-size={_WIDTH},{height}",
        f"--screenshot={file.resolve()}", address,
    ]  # fmt: skip
    for is_last in (False, False, True):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_SHOT_SECONDS)
            return
        except subprocess.TimeoutExpired:
            # The first page of a new server may wait for an answer for ever; the next one does not.
            if is_last:
                raise SystemExit(f"{address} was not drawn in {_SHOT_SECONDS} s") from None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
