"""One writer per folder: real processes, and owners on machines that a lock does not reach."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from vitpipe.contracts.errors import ArtifactError
from vitpipe.stages import folder_lock
from vitpipe.stages.folder_lock import holder_of, lock_of, locked_folders

HOLDER = """
import sys, time
from pathlib import Path
from vitpipe.stages import folder_lock
from vitpipe.stages.folder_lock import locked_folders
with locked_folders(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def write_owner(folder, **changes):
    """The lock file of an owner that is not here."""
    entry = {"host": "elsewhere", "pid": 1, "pod": "pod-1", "time": time.time(), **changes}
    lock_of(folder).write_text(json.dumps(entry))


def test_the_second_one_is_told_who_has_it(tmp_path, holder):
    said = []
    with (
        pytest.raises(ArtifactError, match=f"process {holder.pid} on {socket.gethostname()}") as caught,
        locked_folders(tmp_path / "state", tmp_path / "out", wait_seconds=1, say=said.append),
    ):
        raise AssertionError("must not begin")
    assert caught.value.exit_code == 2
    assert str(holder.pid) in said[0]
    assert len(said) == 1
    assert holder_of(tmp_path / "out")
    assert not holder_of(tmp_path / "state")
    assert not lock_of(tmp_path / "state").exists()


def test_it_waits_for_one_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGTERM)
    with locked_folders(tmp_path / "out", wait_seconds=30):
        assert holder_of(tmp_path / "out") == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_does_not_hold_anything(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert lock_of(tmp_path / "out").exists()
    with locked_folders(tmp_path / "out", wait_seconds=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine_that_is_at_work(tmp_path, monkeypatch):
    """Where locks mean nothing, the file is refreshed: that shows life."""
    out = tmp_path / "out"
    write_owner(out)
    real_sleep = time.sleep

    def refreshed(seconds):
        write_owner(out)
        real_sleep(0.01)

    monkeypatch.setattr(folder_lock.time, "sleep", refreshed)
    with pytest.raises(ArtifactError, match="pod-1"), locked_folders(out, wait_seconds=0.2):
        raise AssertionError("must not begin")


def test_an_owner_on_another_machine_that_has_died_is_waited_for_until_that_is_certain(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_owner(out)
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 1.0)
    with locked_folders(out, wait_seconds=0, say=lambda line: None):
        assert json.loads(lock_of(out).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"host": "elsewhere"}',
        json.dumps({"host": "elsewhere", "pid": 1, "pod": "", "time": 0}),
        json.dumps({"host": socket.gethostname(), "pid": 1, "pod": "", "time": 9e12}),
    ],
)
def test_files_that_hold_nobody(tmp_path, content):
    lock_of(tmp_path / "out").write_text(content)
    assert not holder_of(tmp_path / "out")
    with locked_folders(tmp_path / "out", wait_seconds=0):
        pass


def test_without_locks_the_file_decides(tmp_path, monkeypatch):
    """A mounted bucket refuses flock, or grants it to everybody."""
    monkeypatch.setattr(folder_lock, "_flock", lambda descriptor: False)
    monkeypatch.setattr(folder_lock, "_SETTLE_SECONDS", 0.0)
    out = tmp_path / "out"
    with locked_folders(out, wait_seconds=0):
        entry = json.loads(lock_of(out).read_text())
        assert entry["pid"] == os.getpid()
        assert holder_of(out) == ""  # by flock alone; who starts looks at the file:
        assert folder_lock._try(lock_of(out)) is None
    write_owner(out, host=socket.gethostname(), pid=2**22 + 1, pod="")
    with locked_folders(out, wait_seconds=0):
        pass


def test_the_file_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "REFRESH_SECONDS", 0.05)
    with locked_folders(tmp_path / "out"):
        first = json.loads(lock_of(tmp_path / "out").read_text())["time"]
        deadline = time.monotonic() + 20
        while json.loads(lock_of(tmp_path / "out").read_text() or "{}").get("time", first) == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_many_at_once_take_turns(tmp_path):
    code = HOLDER.replace(
        "time.sleep(60)",
        "p = Path(sys.argv[1] + '.busy'); p.touch(exist_ok=False); time.sleep(0.1); p.unlink()",
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
        for _ in range(5)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_is_no_lock_is_left_alone(tmp_path, kind):
    mine, lock = tmp_path / "report.md", lock_of(tmp_path / "out")
    mine.write_text("my results")
    if kind == "link":
        lock.symlink_to(mine)
    elif kind == "file":
        lock.write_text("my notes")
    else:
        lock.mkdir()
    with pytest.raises(ArtifactError, match="taken by something else"), locked_folders(tmp_path / "out"):
        pass
    assert mine.read_text() == "my results"
    assert kind != "file" or lock.read_text() == "my notes"


def test_a_rank_that_starts_again_in_its_pod_does_not_wait_for_the_one_that_died(
    tmp_path, holder, monkeypatch
):
    holder.kill()
    holder.wait()
    monkeypatch.setenv("POD_NAME", "job-node-0-0-abcde")
    out = tmp_path / "out"
    write_owner(out, host=socket.gethostname(), pid=holder.pid, pod="job-node-0-0-abcde")
    with locked_folders(out, wait_seconds=0):
        assert json.loads(lock_of(out).read_text())["pod"] == "job-node-0-0-abcde"
    # Another pod's process numbers say nothing.
    write_owner(out, host=socket.gethostname(), pid=holder.pid, pod="job-node-0-0-zyxwv")
    assert holder_of(out)
