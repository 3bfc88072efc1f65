"""`environment/install.py` as a process, with the real uv, on a small checkout whose packages lie in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_checkout import PROJECT, UV, Checkout, wheel

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a checkout")


def test_make_says_nothing_when_it_is_there_and_minds_a_named_python(checkout):
    first = checkout.make("setup", f"PYTHON={sys.executable}")
    assert first.returncode == 0, first.stderr
    assert checkout.runs() == "the verb\n"
    # Its folders are placed once, by a verb that prints here.
    assert first.stdout.endswith("the verb\n")
    (checkout.root / "artifacts").mkdir()
    again = checkout.make("setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert checkout.make("setup", f"PYTHON={sys.executable}").stdout == ""
    refused = checkout.make("test", "PYTHON=/nowhere/python3.13")
    assert refused.returncode == 2
    assert "PYTHON=/nowhere/python3.13 is not a CPython" in refused.stderr


def test_made_once_then_left_alone(checkout):
    # The bytecode is written all the same: else every start of a verb would compile all its modules.
    first = checkout.install(PYTHONDONTWRITEBYTECODE="1")
    assert first.returncode == 0, first.stderr
    assert list((checkout.root / "vitpipe" / "__pycache__").glob("cli.*.pyc"))
    assert "ready after" in first.stdout
    assert "torch 1.0 works" in first.stdout
    assert checkout.packages() == {*checkout.names, "vitpipe"}
    assert checkout.runs() == "the verb\n"  # its scripts work where it was renamed to
    assert checkout.leftovers() == [".venv"]
    before = (checkout.venv / ".ready").stat().st_mtime_ns
    second = checkout.install()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert (checkout.venv / ".ready").stat().st_mtime_ns == before
    assert checkout.install("--check").returncode == 0


def test_a_changed_lock_replaces_it_and_names_what_goes(checkout):
    checkout.install()
    wheel(checkout.index, "by_hand")
    command = [UV, "pip", "install", "--python", checkout.venv / "bin" / "python", "by_hand"]
    subprocess.run(command, env=checkout.environment(), check=True, capture_output=True)
    checkout.write_lock("torch", "torchvision", "dummy")
    assert checkout.install("--check").returncode == 1
    done = checkout.install()
    assert checkout.packages() == {"torch", "torchvision", "dummy", "vitpipe"}
    assert (
        "no longer installed, because they are not in the lock: by_hand, nvidia_cudnn, triton" in done.stdout
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}, "packages cannot be fetched"),
        ({"UV_CACHE_DIR": "/proc/1/nowhere"}, "uv's cache, or the folder of the environment, cannot be written"),
        ({"FAIL_BUILD": "1"}, "told to fail"),
    ],
    ids=["no network", "no cache", "no build"],
)  # fmt: skip
def test_what_fails_changes_nothing_and_is_a_paragraph(checkout, variables, expected):
    checkout.install()
    checkout.write_lock("torch", "torchvision")
    shutil.rmtree(checkout.root / "cache")
    failed = checkout.install(**variables)
    assert failed.returncode == 1
    assert expected in failed.stderr
    assert "Fix:" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert "dummy" in checkout.packages()  # the earlier environment is whole and works
    assert checkout.runs() == "the verb\n"
    assert checkout.leftovers() == [".venv"]


def test_a_file_that_is_not_the_locked_one_is_refused(checkout):
    wheel(checkout.index, "dummy", **{"more.py": "something else"})
    failed = checkout.install()
    assert failed.returncode == 1
    assert "the checksum of a package differs from the lock" in failed.stderr
    assert checkout.leftovers() == []


def test_a_program_that_dies_is_named_by_its_signal(checkout):
    content = "import os; os.kill(os.getpid(), 7)"
    checkout.lines["torch"] = wheel(checkout.index, "torch", **{"torch.py": content})
    checkout.write_lock("torch", "torchvision")
    failed = checkout.install()
    assert (failed.returncode, checkout.leftovers()) == (1, [])
    assert "do not work (signal 7)" in failed.stderr


def test_packages_that_do_not_work_are_not_put_in_place(checkout):
    content = "raise ImportError('libtorch.so')"
    checkout.lines["torch"] = wheel(checkout.index, "torch", **{"torch.py": content})
    checkout.write_lock("torch", "torchvision")
    failed = checkout.install()
    assert (failed.returncode, checkout.leftovers()) == (1, [])
    assert "do not work (ImportError: libtorch.so)" in failed.stderr
    assert str(checkout.root / "cache") in failed.stderr


@pytest.mark.parametrize("statement", ["import vitpipe.gone", "from vitpipe.cli import gone"])
def test_a_missing_module_of_the_checkout_is_not_blamed_on_the_cache(checkout, statement):
    # As after a renaming that forgot TRIALS.
    checkout.lines["torch"] = wheel(checkout.index, "torch", **{"torch.py": statement})
    checkout.write_lock("torch", "torchvision")
    failed = checkout.install()
    assert (failed.returncode, checkout.leftovers()) == (1, [])
    assert "a module of this checkout cannot be imported" in failed.stderr
    assert "TRIALS" in failed.stderr
    assert str(checkout.root / "cache") not in failed.stderr


def test_a_damaged_package_in_the_cache_is_named(checkout):
    checkout.install()
    shutil.rmtree(checkout.venv)
    for place in (checkout.root / "cache").glob("archive-v0/*/dummy-1.0.dist-info"):
        shutil.rmtree(place)
    failed = checkout.install()
    assert failed.returncode == 1
    assert "a package in uv's cache is damaged" in failed.stderr
    assert str(checkout.root / "cache") in failed.stderr
    shutil.rmtree(checkout.root / "cache")
    assert checkout.install().returncode == 0


@pytest.mark.parametrize("kind", ["folder", "environment"])
def test_what_it_did_not_make_is_left_alone(checkout, kind):
    if kind == "folder":
        checkout.venv.mkdir()
        (checkout.venv / "thesis.tex").write_text("mine")
    else:
        subprocess.run([UV, "venv", "--quiet", checkout.venv], check=True)
    refused = checkout.install()
    assert refused.returncode == 1
    assert "was not made by `make setup`, so it is not replaced" in refused.stderr
    assert checkout.leftovers() == [".venv"]
    assert (checkout.venv / ("thesis.tex" if kind == "folder" else "pyvenv.cfg")).exists()


def test_a_link_is_followed_and_stays(checkout, tmp_path):
    elsewhere = tmp_path / "large disk"
    elsewhere.mkdir()
    checkout.venv.symlink_to(elsewhere / "environment")
    for names in (("torch", "torchvision"), ("torch", "torchvision", "dummy")):
        checkout.write_lock(*names)
        assert checkout.install().returncode == 0
        assert checkout.venv.is_symlink()
        assert checkout.packages() == {*names, "vitpipe"}
    assert [p.name for p in elsewhere.iterdir()] == ["environment"]


def test_folders_with_names_like_ours_are_left_alone(checkout):
    foreign = [checkout.root / name for name in (".venv.old", ".venv.new", ".venv.setup-mine")]
    for folder in foreign:
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    for names in (("torch", "torchvision"), ("torch", "torchvision", "dummy")):
        checkout.write_lock(*names)
        assert checkout.install().returncode == 0
    assert all((folder / "thesis.tex").exists() for folder in foreign)
    assert len(checkout.leftovers()) == 4


def test_only_what_is_installed_counts_in_the_project_file(checkout):
    checkout.install()
    project = checkout.root / "pyproject.toml"
    project.write_text(PROJECT + "[tool.ruff]\nline-length = 100\n")
    assert checkout.install("--check").returncode == 0
    project.write_text(PROJECT.replace('version = "0"', 'version = "1"'))
    assert checkout.install("--check").returncode == 1


def test_a_folder_that_does_not_exist_yet(checkout):
    done = checkout.install("--venv", "build/pythons/this")
    assert done.returncode == 0, done.stderr
    assert "`. build/pythons/this/bin/activate`" in done.stdout


def start(checkout, **variables):
    """An installation that stays in its last step. Shells start background jobs with Ctrl-C ignored; not this."""
    (marker := checkout.root / "building").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, checkout.root / "environment" / "install.py"], cwd=checkout.root, text=True,
        env=checkout.environment(BUILD_SECONDS="60", **variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_killed_at_once_it_leaves_the_earlier_one_and_the_next_cleans_up(checkout):
    checkout.install()
    checkout.write_lock("torch", "torchvision")
    process = start(checkout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkout.runs() == "the verb\n"
    assert "dummy" in checkout.packages()
    assert len(checkout.leftovers()) > 1
    assert checkout.install().returncode == 0
    assert "dummy" not in checkout.packages()
    assert checkout.leftovers() == [".venv"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_cleans_up_itself(checkout, number):
    process = start(checkout)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "interrupted; no incomplete environment was left" in said[1]
    assert checkout.leftovers() == []


def test_two_at_once_take_turns(checkout):
    first = start(checkout)
    second = subprocess.Popen(
        [sys.executable, checkout.root / "environment" / "install.py"], cwd=checkout.root, text=True,
        env=checkout.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert "waiting for it" in second.stdout.readline()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.wait(timeout=60) == 0, second.communicate()
    assert checkout.packages() == {*checkout.names, "vitpipe"}


def test_torch_of_another_index_and_no_cuda_packages(checkout, tmp_path):
    other = tmp_path / "cpu"
    for name in ("torch", "torchvision"):
        wheel(other, name, "1.0+cpu")
    done = checkout.install(TORCH_INDEX=other.as_uri())
    assert done.returncode == 0, done.stderr
    assert "torch 1.0+cpu works" in done.stdout, done.stdout
    assert checkout.packages() == {"torch", "torchvision", "dummy", "vitpipe"}
    assert checkout.install("--check").returncode == 0
    assert checkout.install("--check", TORCH_INDEX="none").returncode == 1
    checkout.write_lock("torch", "torchvision")
    undecided = checkout.install()
    assert undecided.returncode == 1
    assert "TORCH_INDEX=none" in undecided.stderr
    failed = checkout.install(TORCH_INDEX="http://me:secret@127.0.0.1:9/simple", UV_HTTP_RETRIES="0")
    assert failed.returncode == 1
    assert "secret" not in failed.stdout + failed.stderr
    assert checkout.install(TORCH_INDEX="none").returncode == 0
    assert checkout.packages() == {"torch", "torchvision", "vitpipe"}


def test_another_python_is_made_only_when_it_is_named(checkout):
    checkout.install()
    stamp = checkout.venv / ".ready"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "python": "3.0"}))
    assert checkout.install("--check").returncode == 0
    assert checkout.install("--check", PYTHON=sys.executable).returncode == 1


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_stamp_is_no_environment(checkout, content):
    checkout.install()
    (checkout.venv / ".ready").write_text(content)
    assert checkout.install("--check").returncode == 1
    assert checkout.install().returncode == 0
    assert checkout.install("--check").returncode == 0
