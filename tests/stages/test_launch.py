"""What a stage's process sets before its work."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from vitpipe.contracts.processes import TIED_VARIABLE
from vitpipe.stages.launch import num_ranks_wanted

# A rank that a signal ends in order, one that fails, one that is killed.
RANKS = {
    "waits": (
        "import os, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def end(number, frame):\n"
        "    open(f'stopped{rank}', 'w').write(str(number)); sys.exit(128 + number)\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, end)\n"
        "open(f'started{rank}', 'w').close()\n"
        "time.sleep(120)\n"
    ),
    "fails": "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(2)\ntime.sleep(120)\n",
    "is killed": "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    "time.sleep(120)\n",
}


@pytest.fixture
def launch(tmp_path):
    """Starts two ranks of one of `RANKS` as a child in `tmp_path`."""
    started = []

    def start(kind: str, **variables: str) -> subprocess.Popen:
        (tmp_path / "rank.py").write_text(RANKS[kind])
        command = [sys.executable, "-m", "vitpipe.stages.ranks_launcher", "--standalone"]
        child = subprocess.Popen(
            [*command, "--nproc-per-node=2", "rank.py"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
            # As in a terminal, also where the tests run in the background, which ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


def wait_for_ranks(child, folder):
    deadline = time.monotonic() + 60
    while not all((folder / f"started{rank}").exists() for rank in (0, 1)):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_ends_without_a_traceback(launch, tmp_path, number):
    child = launch("waits")
    wait_for_ranks(child, tmp_path)
    child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + number
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert "Traceback" not in said


def test_the_launcher_dies_with_the_process_that_it_is_tied_to(launch, tmp_path):
    """Which is not its parent: between DVC and a stage there may be a shell."""
    starter = subprocess.Popen(["sleep", "120"])
    child = launch("waits", **{TIED_VARIABLE: str(starter.pid)})
    wait_for_ranks(child, tmp_path)
    starter.kill()
    starter.wait()
    assert child.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("kind", "code", "said"), [("fails", 2, ""), ("is killed", 137, "killed by signal 9")]
)
def test_the_exit_code_is_that_of_the_rank_that_failed(launch, kind, code, said):
    child = launch(kind)
    shown = child.communicate(timeout=60)[1]
    assert child.returncode == code
    assert said in shown
    assert "Traceback" not in shown


def test_freed_memory_is_used_again():
    """A block that is freed and asked for again is not cleared page by page: 64 MiB are 16,384 pages."""
    code = (
        "import resource, ctypes\n"
        "from vitpipe.stages.launch import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3):\n"
        "    before = faults()\n"
        "    block = libc.malloc(2**26)\n"
        "    ctypes.memset(block, 1, 2**26)\n"
        "    libc.free(block)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Another C library may clear its pages: there nothing is set, and nothing fails.
    assert int(done.stdout) < 100 or platform.libc_ver()[0] != "glibc"


ONCE = (
    "import os, signal, sys\n"
    "rank = os.environ['RANK']\n"
    "with open(f'starts{rank}', 'a') as file: file.write('x')\n"
)
AGAIN = {
    # A kill in the first round only; a rank that has said what is wrong; one that was asked to stop.
    "is killed once": ONCE
    + "if rank == '1' and len(open('starts1').read()) == 1: os.kill(os.getpid(), signal.SIGKILL)\n",
    "refuses": ONCE + "sys.exit(2)\n",
    "was stopped": ONCE + "sys.exit(143)\n",
    "has said it": ONCE
    + "from vitpipe.stages.launch import tell_torchrun\ntell_torchrun(ValueError('no')); sys.exit(1)\n",
    "always fails": ONCE + "sys.exit(1)\n",
}


@pytest.mark.parametrize(
    ("kind", "code", "starts"),
    [
        ("is killed once", 0, 2),
        ("refuses", 2, 1),
        ("was stopped", 143, 1),
        ("has said it", 1, 1),
        ("always fails", 1, 3),
    ],
)
def test_ranks_start_again_unless_they_have_ended_on_purpose(tmp_path, kind, code, starts):
    (tmp_path / "rank.py").write_text(AGAIN[kind])
    command = [sys.executable, "-m", "vitpipe.stages.ranks_launcher", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=2", "rank.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    # A rank may be stopped before its first line.
    assert max(len(file.read_text()) for file in tmp_path.glob("starts*")) == starts
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "asked", "wanted"),
    [
        ({}, None, 1),
        ({}, 3, 3),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, None, 2),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"}, None, 16),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}, None, 1),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, None, 2),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"}, 1, 1),
    ],
)
def test_a_job_says_how_many_ranks_share_a_stage(monkeypatch, variables, asked, wanted):
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert num_ranks_wanted("prepare", asked) == wanted
