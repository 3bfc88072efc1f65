"""The prepare stage as a process, killed while it packs and resumed: same bytes, complete shards reused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitpipe.config.data import EmbeddedConfig
from vitpipe.data.manifest import ShardManifest, read_manifest
from vitpipe.datasets.embedded.write import write_embedded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset of three shards of 1 MB."""
    root = tmp_path_factory.mktemp("source")
    write_embedded(root, ("imagenet",), EmbeddedConfig(image_size=64, train_images=700, val_images=60))
    return root


def start(root, out):
    command = [
        sys.executable, "-m", "vitpipe", "run", "prepare", "--recipe", "itpn/pixel_base", "--profile", "full",
        "--set", f"data.root={root}", "--set", "stages=[prepare]", "--set", "data.sets=[imagenet]",
        "--set", "data.shard_megabytes=1", "--set", "data.workers=1", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(root, out):
    process = start(root, out)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def packed(out):
    names = ("*.tar", "*.index", "findings.csv")
    return {path.name: path.read_bytes() for name in names for path in (out / "imagenet").glob(name)}


def test_a_killed_stage_resumes_and_writes_the_same_bytes(source, tmp_path):
    finish(source, tmp_path / "uninterrupted")
    out, work = tmp_path / "out", tmp_path / ".out.state" / "pack" / "imagenet"
    process = start(source, out)
    end = time.monotonic() + 60
    while not (work / "train-000001.tar").exists() and time.monotonic() < end:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists(), "no output folder appears"
    first = (work / "train-000000.tar").stat()
    finish(source, out)
    assert packed(out) == packed(tmp_path / "uninterrupted")
    kept = (out / "imagenet" / "train-000000.tar").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (first.st_ino, first.st_mtime_ns), "it was not packed again"
    assert not (tmp_path / ".out.state").exists()
    digests = {
        read_manifest(folder / "imagenet", ShardManifest).digest
        for folder in (out, tmp_path / "uninterrupted")
    }
    assert len(digests) == 1
