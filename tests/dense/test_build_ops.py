"""The script that compiles mmcv's operators: its cache, its checks and its messages; the compiler is played."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ops():
    """`docker/build_ops.py` as a module."""
    spec = importlib.util.spec_from_file_location("build_ops", ROOT / "docker" / "build_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wheels"


@pytest.fixture
def pip(ops, monkeypatch):
    """Plays pip: `builds` and `installs` are what it was asked; `log` and `status` what building answers."""
    play = SimpleNamespace(builds=[], installs=[], log="", status=0)

    def run_logged(command, environment, log):
        play.builds.append((command, environment))
        log.write_text(play.log)
        out = Path(command[command.index("--wheel-dir") + 1])
        out.mkdir()
        if play.status == 0:
            (out / "onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl").write_text("wheel")
        return play.status

    def run(command, **options):
        play.installs.append(command)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(ops, "check_means", lambda place, environment: None)
    monkeypatch.setattr(ops, "run_logged", run_logged)
    monkeypatch.setattr(ops, "subprocess", SimpleNamespace(run=run, Popen=subprocess.Popen))
    return play


def test_lock_file_pins_one_source_without_an_address(ops):
    assert re.fullmatch(r"onedl-mmcv==2\.3\.6 --hash=sha256:[0-9a-f]{64}", ops.pinned())
    assert "http" not in ops.LOCK_FILE.read_text()


def test_key_follows_what_the_operators_depend_on(ops, monkeypatch):
    plain = ops.build_key({})
    assert plain.startswith("torch2.")
    assert sys.implementation.cache_tag in plain
    assert ops.build_key({"PATH": "/elsewhere", "MAX_JOBS": "7"}) == plain
    assert ops.build_key({"CFLAGS": "-O1 -g0"}) == plain
    keys = {plain, ops.build_key({"CFLAGS": "-O3"}), ops.build_key({"FORCE_CUDA": "1"})}
    monkeypatch.setattr(ops, "torch_version", lambda: "9.9.9+cpu")
    assert len(keys | {ops.build_key({})}) == 4


def test_builds_once_then_takes_the_cache(ops, cache, pip, capsys):
    assert ops.main([]) == ops.main([]) == 0
    assert len(pip.builds) == 1
    said = capsys.readouterr().out
    assert "usually takes 5 to 10 minutes" in said
    assert "from the cache" in said
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert pip.installs[0][-1] == str(next(folder.glob("*.whl")))
    assert ops.main(["--rebuild"]) == 0
    assert len(pip.builds) == 2


def test_build_is_pinned_alone_and_against_this_torch(ops, cache, pip):
    assert ops.main([]) == 0
    command, environment = pip.builds[0]
    assert {"--require-hashes", "--no-deps", "--no-build-isolation", "--no-cache-dir"} <= set(command)
    assert command[command.index("--no-binary") + 1] == "onedl-mmcv"
    assert environment["CFLAGS"] == "-O1 -g0"
    assert int(environment["MAX_JOBS"]) >= 1
    assert Path(environment["TMPDIR"]).is_relative_to(cache)
    assert "--no-index" in pip.installs[0]


def test_failed_build_leaves_its_log_only(ops, cache, pip, capsys):
    pip.status, pip.log = 1, "c++: fatal error: Killed signal terminated program cc1plus\n"
    assert ops.main([]) == 1
    message = capsys.readouterr().err
    assert "memory" in message
    assert "MAX_JOBS=1" in message
    assert {path.suffix for path in cache.iterdir()} == {".log", ""}
    assert not any(path.is_dir() for path in cache.iterdir())


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "not the pinned one"),
        ("ERROR: Could not find a version that satisfies", "cannot be fetched"),
        ("Failed to establish a new connection", "cannot be fetched"),
        ("ops.cpp:3:1: error: expected unqualified-id", "ops.cpp:3:1: error: expected unqualified-id"),
        ("nothing of interest", "see the log"),
    ],
)
def test_reasons(ops, tmp_path, log, expected):
    path = tmp_path / "build.log"
    path.write_text(f"first line\n{log}\nlast line\n")
    message = ops.why_failed(path)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_missing_means_are_said_first(ops, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(ops.BuildError, match=r"no C\+\+ compiler"):
            ops.check_means(tmp_path, {})
    monkeypatch.setattr(ops.shutil, "which", lambda name: f"/usr/bin/{name}")
    with monkeypatch.context() as patch:
        patch.setattr(ops.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(ops.BuildError, match="headers are missing"):
            ops.check_means(tmp_path, {})
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(ops.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(ops.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    with pytest.raises(ops.BuildError, match="GiB of disk"):
        ops.check_means(tmp_path, {})


def test_cache_that_cannot_be_written(ops, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("VITPIPE_CACHE", str(file))
    assert ops.main([]) == 1
    assert "VITPIPE_CACHE" in capsys.readouterr().err


def test_two_at_once_build_one_after_the_other(ops, tmp_path, capsys):
    order = []

    def second():
        with ops.only_one(tmp_path):
            order.append("second")

    with ops.only_one(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting" in capsys.readouterr().out


def test_progress_is_told(ops, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "SECONDS_BETWEEN_NOTES", 0.0)
    script = "print('[3/90] c++ one.o'); print('noise'); raise SystemExit(5)"
    log = tmp_path / "log"
    assert ops.run_logged([sys.executable, "-c", script], {}, log) == 5
    assert log.read_text() == "[3/90] c++ one.o\nnoise\n"
    assert "3 of 90" in capsys.readouterr().out
