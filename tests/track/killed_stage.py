"""A stage with a forked worker that is killed with SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A stage that forks a worker, commits three points, and waits to be killed. The worker inherits every open
# file, as loader workers do, and keeps the pipe to the uploader open.
STAGE = """
import os, sys, time
from pathlib import Path
from vitpipe.config.read import load_recipe
from vitpipe.track.stage_run import stage_run
root = Path(sys.argv[1])
(root / "out").mkdir(exist_ok=True)
with stage_run(stage="pretrain", recipe=load_recipe("itpn/pixel_base", "demo"), folder=root / "out", state=root / ".out.state") as run:
    worker = os.fork()
    if worker == 0:
        time.sleep(120)
        os._exit(0)
    for step in (1, 2, 3):
        run.metrics({"train/loss": 1 / step}, step)
    run.commit(3)
    run.metrics({"train/loss": 0.0}, 4)
    print(worker, run._uploader._process.pid, flush=True)
    time.sleep(120)
"""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_stage(root: Path, is_ready: Callable[[], bool], *, with_uploader: bool = False) -> float:
    """Kill the stage with SIGKILL when `is_ready`, optionally its uploader first.

    Returns:
        Seconds between the stage's death and the uploader's exit.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = uploader = 0
    try:
        worker, uploader = map(int, process.stdout.readline().split())
        until = time.monotonic() + 120
        while not is_ready() and time.monotonic() < until:
            time.sleep(0.05)
        if with_uploader:
            os.kill(uploader, signal.SIGKILL)
        process.kill()
        killed = time.monotonic()
        process.wait()
        while _is_alive(uploader) and time.monotonic() - killed < 60:
            time.sleep(0.1)
        exit_seconds = time.monotonic() - killed
        assert _is_alive(worker)  # it kept the pipe open all the time
        return exit_seconds
    finally:
        for pid in filter(None, (worker, uploader)):
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
