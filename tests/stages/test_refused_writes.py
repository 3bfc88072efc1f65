"""A limit on the size of files (`ulimit -f`) is a refused write like a full disk: a message, never a traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TINY = ["train_images=20", "val_images=10", "intermediate_images=10"]


def limited(kib: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024))

    return limit


@pytest.mark.parametrize("kib", [4, 60])
def test_files_beyond_the_limit(tmp_path, kib):
    """At 4 KiB the raw images are refused, at 60 the packed ones."""
    command = [
        sys.executable,
        "-m",
        "vitpipe",
        "run",
        "prepare",
        "--recipe",
        "itpn/pixel_base",
        "--out",
        "prepared",
    ]
    for text in (
        "stages=[prepare]",
        "data.sets=[imagenet]",
        "data.workers=0",
        *(f"data.embedded.{t}" for t in TINY),
    ):
        command += ["--set", text]
    environment = {**os.environ, "VITPIPE_TRACKING": "off"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(kib),
    )
    assert done.returncode == 1
    assert "The disk refused a write (File too large)" in done.stderr
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "prepared").exists()
    # With the limit gone the same command ends well.
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
