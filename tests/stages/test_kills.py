"""Real stages with loader processes, killed at random moments with their whole group: nothing lost, nothing left.

VITPIPE_KILLS says how often each stage is killed; the campaign that is reported uses ten, and kills pre-training and
segmentation, too. Without it these two are left to test_state_folder.py, tests/pipelines/test_local_reuse.py and
tests/dense/test_dense_stages.py, which kill and resume them in the same way.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from shared_folder import shared_folder

pytestmark = [pytest.mark.slow, pytest.mark.dense, pytest.mark.timeout(3000)]

IS_CAMPAIGN = "VITPIPE_KILLS" in os.environ
NUM_KILLS = int(os.environ.get("VITPIPE_KILLS", "1"))
KILLED = ("pretrain", "finetune", "detect", "segment") if IS_CAMPAIGN else ("finetune", "detect")
SECONDS_LEFT_ALIVE = 40
SMALL = (
    "data.embedded.train_images=48", "data.embedded.val_images=60", "data.embedded.intermediate_images=60",
    "data.embedded.scene_train_images=12", "data.embedded.scene_val_images=3", "data.embedded.video_frames=2",
    "data.embedded.videos=1", "data.workers=1",
    *(f"{stage}.{key}" for stage in ("pretrain", "intermediate", "finetune")
      for key in ("epochs=1", "global_batch=16", "optim.warmup_epochs=0")),
    *(("pretrain.epochs=30", "finetune.epochs=30") if IS_CAMPAIGN else ("finetune.epochs=12",)),
    "finetune.ema_decay=0.9", f"detect.epochs={5 if IS_CAMPAIGN else 3}", "detect.optim.drop_epochs=[]", "detect.global_batch=2", "detect.log_every_steps=1",
    "segment.steps=30", "segment.global_batch=2", "segment.log_every_steps=1",
    *(f"{stage}.checkpoint_minutes=0.01" for stage in ("pretrain", "finetune", "detect", "segment")),
)  # fmt: skip
INPUTS = {
    "pretrain": {"data": "prepare"},
    "intermediate": {"data": "prepare", "weights": "pretrain"},
    "finetune": {"data": "prepare", "weights": "intermediate"},
    "detect": {"data": "prepare", "weights": "pretrain"},
    "segment": {"data": "prepare", "weights": "pretrain"},
}


class Stage:
    """One stage's command, and the processes that belong to it."""

    def __init__(self, name: str, chain: Path, out: Path, *, is_tracked: bool) -> None:
        self.name, self.out, self.mark, self.is_tracked = name, out, uuid.uuid4().hex, is_tracked
        self.command = [
            *(
                sys.executable,
                "-m",
                "vitpipe",
                "run",
                name,
                "--recipe",
                "itpn/pixel_base",
                "--profile",
                "demo",
            ),
            *(part for value in SMALL for part in ("--set", value)),
            *(
                part
                for key, made in INPUTS.get(name, {}).items()
                for part in ("--in", f"{key}={chain / made}")
            ),
            *("--out", str(out)),
        ]

    def start(self) -> subprocess.Popen:
        """The stage in a process group of its own."""
        store = f"sqlite:///{self.out.parent / 'mlflow.db'}"
        env = {**os.environ, "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1", "KILL_MARK": self.mark}
        if self.is_tracked:
            del env["VITPIPE_TRACKING"]
        log = (self.out.parent / f"{self.out.name}.log").open("ab")
        return subprocess.Popen(
            self.command, cwd=self.out.parent, env=env, stdout=log, stderr=log, start_new_session=True
        )

    def log(self) -> str:
        """All that was said so far."""
        return (self.out.parent / f"{self.out.name}.log").read_text()

    def finish(self) -> None:
        """Run to the end."""
        assert self.start().wait(timeout=600) == 0, self.log()[-3000:]

    def alive(self) -> list[str]:
        """Processes, whatever their group, that the stage has started."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (place / "environ").read_bytes():
                    command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"{place.name} {command[:90]}")
        return found

    def steps_saved(self) -> int:
        """How many states have been written."""
        return len(list(self.out.with_name(f".{self.out.name}.state").glob("state-*.pt")))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The stages that feed the others, and an undisturbed run of each that is killed later."""

    def run_all(folder: Path) -> None:
        needed = {"prepare", "pretrain", *KILLED, *(("intermediate",) if "finetune" in KILLED else ())}
        for name in (stage for stage in ("prepare", *INPUTS) if stage in needed):
            Stage(name, folder, folder / name, is_tracked=False).finish()

    return shared_folder(tmp_path_factory, "kill-chain", run_all)


def history(out: Path) -> dict[tuple[str, int], float]:
    """The points of a finished stage, each once."""
    rows = list(csv.DictReader((out / "tables" / "history.csv").open()))
    points = {(row["name"], int(row["step"])): float(row["value"]) for row in rows}
    assert len(points) == len(rows)
    return points


@pytest.mark.parametrize("name", KILLED)
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(name, chain, tmp_path):
    stage, draw = Stage(name, chain, tmp_path / name, is_tracked=True), random.Random(name)
    for kill in range(NUM_KILLS):
        saved, process = stage.steps_saved(), stage.start()
        deadline = time.monotonic() + 300
        while stage.steps_saved() <= min(saved, 1) and process.poll() is None and kill % 3 != 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 4))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + SECONDS_LEFT_ALIVE
        while stage.alive():
            assert time.monotonic() < deadline, stage.alive()
            time.sleep(0.2)
    stage.finish()
    assert not stage.alive()
    # As if the machine had died before DVC noted the output: it is written again, from the last state,
    # whether DVC has removed it first or not.
    if name in ("finetune", "detect"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / f"{name}.log").unlink()
    stage.finish()
    assert f"{name}: step" not in stage.log()

    for file in sorted((chain / name).glob("*.safetensors")):
        expected, found = load_file(file), load_file(tmp_path / name / file.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), file.name
    points, undisturbed = history(tmp_path / name), history(chain / name)
    assert points.keys() == undisturbed.keys()
    exact = [key for key in points if "second" not in key[0] and "memory" not in key[0]]
    assert all(points[key] == undisturbed[key] for key in exact)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (found for found in client.search_experiments() if found.name == "vitpipe")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = (found for found in runs if found.data.tags["vitpipe.role"] == "stage")
    assert len(runs) == 2  # the stage's and the pipeline's
    assert run.info.status == "FINISHED"
    told = [
        (metric, point.step)
        for metric in run.data.metrics
        # Of the machine, by MLflow's own monitor; no results.
        if not metric.startswith("system/")
        for point in client.get_metric_history(run.info.run_id, metric)
    ]
    assert len(told) == len(set(told))
    assert set(points) <= set(told)
