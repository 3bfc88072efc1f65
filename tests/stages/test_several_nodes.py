"""Two nodes of a TrainJob as two torchrun agents on the loopback: the command, the variables and the ranks are real.

Each node gets what Trainer's torch plugin sets (PET_*), and runs `vitpipe run pretrain`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_folder import shared_folder
from tiny_runs import free_port

from vitpipe.contracts.artifact import open_artifact
from vitpipe.stages.launch import node_options

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(3000)
SMALL = (
    "data.embedded.train_images=48", "data.embedded.val_images=60", "data.embedded.intermediate_images=60",
    "data.embedded.scene_train_images=12", "data.embedded.scene_val_images=3", "data.embedded.video_frames=2",
    "data.embedded.videos=1", "data.workers=0", "pretrain.global_batch=16",
    "pretrain.micro_batch=4", "pretrain.optim.warmup_epochs=0", "pretrain.checkpoint_minutes=0.0001",
)  # fmt: skip
STEPS_PER_EPOCH = 3
# Rounding differs between numbers of ranks, and Adam turns the rounding of a gradient that is zero into steps.
SHORT, LONG = 2, 10
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_left():
    """A failed test leaves no torchrun behind; its ranks die with it."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


class Node:
    """The command of one node of a job, or, without variables, of a process of its own."""

    def __init__(self, root: Path, out: Path, epochs: int, stage: str = "pretrain", **variables: str) -> None:
        self.log = out.with_name(f"{out.name}-node{variables.get('PET_NODE_RANK', '')}.log")
        command = [sys.executable, "-m", "vitpipe", "run", stage, "--recipe", "itpn/pixel_base"]
        command += ["--profile", "demo", *(word for value in SMALL for word in ("--set", value))]
        command += ["--set", f"pretrain.epochs={epochs}"]
        inputs = [] if stage == "prepare" else ["--in", f"data={root / 'prepare'}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *inputs, "--out", str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        STARTED.append(self.process)

    def finish(self) -> str:
        """What the node has said, after a good end."""
        code = self.process.wait(timeout=1200)
        assert code == 0, self.log.read_text()[-3000:]
        return self.log.read_text()

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that torchrun has started here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [(int(pid), Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in children]
        return [pid for pid, command in found if b"vitpipe\0run" in command]


def nodes(root: Path, out: Path, epochs: int, ranks_per_node: int = 1) -> list[Node]:
    """Both nodes of one job, started."""
    job = {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": str(ranks_per_node), "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [Node(root, out, epochs, **job, PET_NODE_RANK=rank) for rank in ("1", "0")][::-1]


def weights(out: Path) -> dict[str, torch.Tensor]:
    artifact = open_artifact(out, "pretrain")
    artifact.verify()
    return load_file(artifact.weights)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data; pre-training by one process that accumulates and on two nodes; a longer one on two nodes."""

    def run_all(folder: Path) -> None:
        Node(folder, folder / "prepare", SHORT, "prepare").finish()
        Node(folder, folder / "one", SHORT).finish()
        for name, epochs in (("two", SHORT), ("unbroken", LONG)):
            for node in nodes(folder, folder / name, epochs):
                node.finish()

    return shared_folder(tmp_path_factory, "several-nodes", run_all)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)


@slow
def test_two_nodes_train_as_one_process_that_accumulates(root):
    assert_close(weights(root / "two"), weights(root / "one"))
    assert f"step {SHORT * STEPS_PER_EPOCH}/{SHORT * STEPS_PER_EPOCH}" in (root / "two-node0.log").read_text()
    # Rank 0, the one that speaks, is on node 0: that node's log is what a launcher shows.
    assert "step" not in (root / "two-node1.log").read_text()


@slow
def test_four_ranks_on_two_nodes_train_as_one_process_that_accumulates(root, tmp_path):
    for node in nodes(root, tmp_path / "four", SHORT, 2):
        node.finish()
    assert_close(weights(tmp_path / "four"), weights(root / "one"))


@slow
@pytest.mark.parametrize("killed", [0, 1] if "VITPIPE_KILLS" in os.environ else [0])  # rank 0, the other one
def test_a_killed_rank_starts_all_again_and_the_weights_are_those_of_an_unbroken_run(root, tmp_path, killed):
    job = nodes(root, tmp_path / "out", LONG)
    state = tmp_path / ".out.state"
    deadline = time.monotonic() + 300
    while not list(state.glob("state-*.pt")):
        assert time.monotonic() < deadline
        assert all(node.process.poll() is None for node in job)
        time.sleep(0.02)
    before = [node.ranks() for node in job]
    os.kill(before[killed][0], signal.SIGKILL)
    said = [node.finish() for node in job]
    assert "A rank has died. All start again from the saved state." in said[killed]
    assert "Resuming after step" in said[0]
    found, expected = weights(tmp_path / "out"), weights(root / "unbroken")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@slow
def test_a_wrong_input_ends_both_nodes_at_once(tmp_path):
    (tmp_path / "prepare").mkdir()
    job = nodes(tmp_path, tmp_path / "out", SHORT)
    assert [node.process.wait(timeout=1200) for node in job] == [2, 2]
    for node in job:
        said = node.log.read_text()
        assert said.count("vitpipe: ") == 1, said  # once: nothing was started again
        assert "Traceback" not in said


def test_torchruns_options_on_a_node():
    variables = {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500"}
    first, other = node_options(variables), node_options({**variables, "PET_NODE_RANK": "3"})
    assert "--rdzv-endpoint=job-node-0-0.job:29500" in first
    assert "--rdzv-endpoint=job-node-0-0.job:29500" in other
    assert "--local-addr=job-node-0-0.job" in first
    assert "--local-addr=job-node-0-0.job" not in other
    assert [
        next(o for o in options if "is_host" in o).split("is_host=")[1][0] for options in (first, other)
    ] == [
        "1",
        "0",
    ]
