"""`vitpipe launch` as a process: hand-over, adoption after a kill, deletion when stopped, the executor output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kube_double import DROP
from tiny_runs import free_port

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.artifact import (
    CARD,
    Card,
    RunRecord,
    open_artifact,
    write_card,
    write_metrics,
    writing,
)
from vitpipe.stages.executor import ExecutorIO

WEIGHTS = bytes(range(256)) * 64
SMALL = (
    "data.embedded.train_images=48", "data.embedded.val_images=60", "data.embedded.intermediate_images=60",
    "data.embedded.scene_train_images=12", "data.embedded.scene_val_images=3", "data.embedded.video_frames=2",
    "data.embedded.videos=1", "data.workers=0", "pretrain.global_batch=16", "pretrain.micro_batch=8",
    "pretrain.optim.warmup_epochs=0", "pretrain.epochs=1",
)  # fmt: skip


def finished(out: Path, stage: str) -> None:
    """A finished folder of a stage with one large file and one in a folder."""
    card = Card(
        stage=stage, recipe="itpn/pixel_base", profile="demo", recipe_digest="r", data_digest="d",
        code_digest="c", image="train", identity="i", parents={}, seed=3, libraries={},
    )  # fmt: skip
    with writing(out) as folder:
        write_metrics(folder, {"top1": 0.5, "images_per_second": 7.0})
        (folder / "weights.safetensors").write_bytes(WEIGHTS)
        (folder / "tables").mkdir()
        (folder / "tables" / "t.csv").write_text("a\n1\n")
        write_card(
            folder, card, RunRecord(git_commit="g", started_at="2026-01-01T00:00:00", wall_seconds=1.0)
        )


class Task:
    """A Kubeflow task whose launcher can be started again and again, as its pod is."""

    def __init__(self, root: Path, *, num_nodes: int = 2, run: str = "8d3f") -> None:
        self.root, self.shared = root, root / "shared"
        self.started: list[subprocess.Popen] = []
        self.out = root / "local" / "out"
        self.message = {
            "inputs": {
                "parameterValues": {"overrides": [f"seed={3}", *SMALL]},
                "artifacts": {"data": {"artifacts": [{"name": "out", "uri": str(root / "prepare")}]}},
            },
            "outputs": {
                "artifacts": {
                    "out": {"artifacts": [{"name": "out", "uri": f"s3://b/v2/itpn/{run}/pretrain/1/out",
                                           "customPath": str(self.out)}]},
                    "metrics": {"artifacts": [{"name": "metrics", "uri": str(root / "local" / "metrics")}]},
                },
                "outputFile": str(root / "local" / "executor_output.json"),
            },
        }  # fmt: skip
        self.job = {
            "image": "i", "num_nodes": num_nodes, "gpus_per_node": 0, "cpu": "1", "memory": "4Gi",
            "claims": [{"claim": "runs", "path": str(self.shared)}], "unreachable_seconds": 60,
        }  # fmt: skip

    def start(self, **job) -> subprocess.Popen:
        command = [sys.executable, "-m", "vitpipe", "launch", "pretrain", "--recipe", "itpn/pixel_base"]
        command += ["--profile", "demo", "--executor-input", json.dumps(self.message)]
        command += ["--job", json.dumps({**self.job, **job}), "--shared", str(self.shared)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.started.append(process)
        return process

    def output(self) -> dict:
        written = json.loads((self.root / "local" / "executor_output.json").read_text())["artifacts"]
        return {name: value["artifacts"][0] for name, value in written.items()}


@pytest.fixture
def task(tmp_path):
    finished(tmp_path / "prepare", "prepare")
    found = Task(tmp_path)
    yield found
    for process in found.started:
        process.kill()
        process.wait()


def moved_io(kube, name) -> ExecutorIO:
    """The executor input in the command of a job."""
    arguments = kube.jobs[name]["spec"]["trainer"]["args"]
    return ExecutorIO(arguments[arguments.index("--executor-input") + 1])


def completes(kube, gate=None):
    """A controller whose job writes its folder and completes, when `gate` is open."""

    def play(name):
        kube.put_pod("pod-0", name)
        kube.at_work(name)
        kube.write_log("pod-0", "step 1")
        if gate is not None:
            gate.wait(300)
        if name not in kube.jobs:
            return
        finished(moved_io(kube, name).output_folder(), "pretrain")
        kube.put_pod("pod-0", name, phase="Succeeded", exit_code=0)
        kube.condition(name, "Complete")

    kube.on_create = play


def must_end(process, code):
    said = process.communicate(timeout=1200)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def test_the_result_of_the_job_becomes_the_tasks_own(kube, task):
    completes(kube)
    kube.fail("watch", DROP, 410)
    said = must_end(task.start(), 0)
    assert "step 1" in said
    artifact = open_artifact(task.out, "pretrain")
    artifact.verify()
    assert (task.out / "weights.safetensors").read_bytes() == WEIGHTS
    written = task.output()
    assert written["out"]["metadata"]["receipt"] == file_digest(task.out / CARD)
    assert written["out"]["uri"] == "s3://b/v2/itpn/8d3f/pretrain/1/out"
    assert written["metrics"]["metadata"] == {"top1": 0.5, "images_per_second": 7.0}
    assert (task.root / "local" / "metrics").is_file()
    # Copies are gone from the claim; states would stay.
    assert list((task.shared / "jobs").iterdir()) == []


def test_the_job_sees_the_inputs_on_the_claim_and_the_same_run(kube, task):
    gate = threading.Event()
    completes(kube, gate)
    process = task.start()
    kube.wait_for(lambda: kube.jobs, 200)
    (name,) = kube.jobs
    io = moved_io(kube, name)
    gate.set()
    must_end(process, 0)
    assert io.inputs() == {"data": task.shared / "jobs" / name / "in" / "data"}
    assert io.output_folder() == task.shared / "jobs" / name / "out"
    assert io.pipeline_run("pretrain").folder == "s3://b/v2/itpn/8d3f"
    assert io.parameters() == task.message["inputs"]["parameterValues"]
    arguments = kube.jobs[name]["spec"]["trainer"]["args"]
    assert arguments[:6] == ["run", "pretrain", "--recipe", "itpn/pixel_base", "--profile", "demo"]
    assert arguments[-2:] == ["--states", str(task.shared / "states")]


def test_a_killed_launcher_leaves_the_job_and_the_next_one_adopts_it(kube, task):
    gate = threading.Event()
    completes(kube, gate)
    first = task.start()
    kube.wait_for(lambda: kube.count("watch"), 200)
    first.kill()
    first.wait()
    assert kube.count("delete") == 0
    second = task.start()
    kube.wait_for(lambda: kube.count("watch") >= 2, 200)
    gate.set()
    said = must_end(second, 0)
    assert "is there already and was adopted" in said
    assert kube.count("create") == 1
    assert task.output()["metrics"]["metadata"]["top1"] == 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_deletes_the_job(kube, task, number):
    completes(kube, threading.Event())
    process = task.start()
    kube.wait_for(lambda: kube.count("watch"), 200)
    kube.fail("list", 503)
    process.send_signal(number)
    said = must_end(process, 128 + number)
    assert f"Stopped by {number.name}; the job was deleted" in said
    assert kube.jobs == {}
    body = [body for kind, body in kube.bodies if kind == "delete"][-1]
    assert body["propagationPolicy"] == "Foreground"
    assert not (task.root / "local" / "executor_output.json").exists()


def test_a_failed_job_is_exit_code_1_and_the_next_launcher_makes_it_again(kube, task):
    def fail(name):
        kube.put_pod("pod-0", name, phase="Failed", exit_code=1)
        kube.condition(name, "Failed", reason="FailedJobs")

    kube.on_create = fail
    assert "has failed (FailedJobs)" in must_end(task.start(), 1)
    completes(kube)
    assert "it is made again" in must_end(task.start(), 0)


def test_a_broken_off_copy_of_the_inputs_goes_on(kube, task):
    gate = threading.Event()
    completes(kube, gate)
    first = task.start()
    kube.wait_for(lambda: kube.count("watch"), 200)
    (name,) = kube.jobs
    first.kill()
    first.wait()
    copy = task.shared / "jobs" / name / "in" / "data"
    # As if killed while it copied: no card yet, and one file is missing.
    (copy / CARD).unlink()
    (copy / "weights.safetensors").unlink()
    kept = (copy / "metrics.json").stat().st_ino
    second = task.start()
    kube.wait_for(lambda: kube.count("watch") >= 2, 200)
    assert open_artifact(copy, "prepare").verify() is None
    assert (copy / "metrics.json").stat().st_ino == kept
    gate.set()
    must_end(second, 0)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_nods": 3}, "'num_nods' is not a known key"),
        ({"claims": [{"claim": "runs", "path": "/elsewhere"}]}, "its pods would not see it"),
    ],
)
def test_wrong_settings_are_exit_code_2_before_anything_is_asked(kube, task, change, part):
    assert part in must_end(task.start(**change), 2)
    assert kube.requests == []


def test_a_complete_job_without_its_output_names_the_claim(kube, task):
    kube.on_create = lambda name: kube.condition(name, "Complete")
    assert "check that --shared is one claim" in must_end(task.start(), 2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_real_nodes_end_to_end(kube, tmp_path):
    """The job's own command, run on two nodes as Trainer would: real data, real ranks, real weights."""
    vitpipe = [sys.executable, "-m", "vitpipe"]
    sets = [word for value in SMALL for word in ("--set", value)]
    chosen = ["--recipe", "itpn/pixel_base", "--profile", "demo", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*vitpipe, "run", "prepare", *chosen, "--set", "seed=3", "--out", str(tmp_path / "prepare")],
        check=True, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def play(name):
        trainer = kube.jobs[name]["spec"]["trainer"]
        plugin = {
            "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port()),
        }  # fmt: skip
        given = {v["name"]: v["value"] for v in trainer["env"] if "value" in v}
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", *trainer["command"], *trainer["args"]], text=True,
                env={**environment, **given, **plugin, "PET_NODE_RANK": str(rank), "POD_NAME": f"pod-{rank}"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]  # fmt: skip
        kube.put_pod("pod-0", name)
        kube.at_work(name)
        for line in nodes[0].stdout:
            kube.write_log("pod-0", line.rstrip("\n"))
        codes = [node.wait() for node in nodes]
        kube.put_pod("pod-0", name, phase="Failed" if codes[0] else "Succeeded", exit_code=codes[0])
        kube.condition(name, "Failed" if any(codes) else "Complete")

    kube.on_create = play
    task = Task(tmp_path)
    said = must_end(task.start(), 0)
    assert "pretrain: step 3/3" in said
    artifact = open_artifact(task.out, "pretrain")
    artifact.verify()
    assert artifact.weights.is_file()
    assert artifact.card.parents == {"data": digest_of(open_artifact(tmp_path / "prepare").card)}
    assert task.output()["out"]["metadata"]["stage"] == "pretrain"
    # Beside the states lie the records of stages, in runs/ (vitpipe/stages/run_records.py).
    (state,) = (task.shared / "states").glob("*/finished.json")
    assert list(state.parent.glob("state-*.pt"))
