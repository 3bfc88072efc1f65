"""What `vitpipe doctor` says of GPU, git, Docker and disk; no program may delay it."""

import subprocess
import threading

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.verbs import machine, machine_probes
from vitpipe.verbs.machine_probes import ask_all, examine_docker, examine_git, examine_gpus


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a shell script with some name on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def put(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    value, findings = examine_gpus()
    assert value == "none: the CPU is used" or findings


def test_gpus_as_nvidia_smi_lists_them(programs, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine_probes, "_torch_has_cuda", lambda: True)
    programs("nvidia-smi", 'echo "NVIDIA A100-SXM4-80GB, 81920, 550.54.15"')
    assert examine_gpus() == ("NVIDIA A100-SXM4-80GB, 80.0 GiB, driver 550.54.15", [])
    programs("nvidia-smi", 'echo "NVIDIA T4, 15360, 550.54.15"; echo "GRID, [N/A], 550.54.15"')
    value, _ = examine_gpus()
    assert value == "0: NVIDIA T4, 15.0 GiB, driver 550.54.15; 1: GRID, memory unknown, driver 550.54.15"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine_probes, "_torch_has_cuda", lambda: False)
    assert [finding.what.split()[0] for finding in examine_gpus()[1]] == ["CUDA_VISIBLE_DEVICES", "There"]


def test_a_driver_that_does_not_work(programs):
    programs("nvidia-smi", 'echo "NVIDIA-SMI has failed because it could not communicate"; exit 9')
    value, (finding,) = examine_gpus()
    assert value == "none: the CPU is used"
    assert "could not communicate" in finding.what


@pytest.mark.parametrize(
    ("line", "known"), [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True)]
)
def test_whether_torch_is_built_with_cuda(tmp_path, monkeypatch, line, known):
    class Installed:
        def locate_file(self, name):
            return tmp_path / name

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.15.0'\n{line}\n")
    monkeypatch.setattr(machine_probes, "distribution", lambda name: Installed())
    assert machine_probes._torch_has_cuda() is known


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


def test_the_commit_of_the_code(tmp_path, monkeypatch):
    code = tmp_path / "vitpipe"
    code.mkdir()
    monkeypatch.setattr(machine_probes, "PACKAGE", code)
    value, (finding,) = examine_git()
    assert (value, finding.level) == ("no repository", "note")
    git(tmp_path, "init", "-q", "-b", "main")
    assert examine_git()[0] == "no commit"
    (code / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(machine_probes, "git_commit", lambda: "0" * 40)
    value, findings = examine_git()
    assert value.startswith("commit ")
    assert value.endswith("(main)")
    assert findings == []
    (code / "a.py").write_text("2")
    monkeypatch.setattr(machine_probes, "git_commit", lambda: "0" * 40 + "+changes")
    value, (finding,) = examine_git()
    assert value.endswith("(main), uncommitted: 1 path")
    assert "uncommitted changes" in finding.what
    assert "git status" in finding.fix


def test_a_repository_of_another_user(tmp_path, monkeypatch):
    code = tmp_path / "my code" / "vitpipe"
    code.mkdir(parents=True)
    git(code.parent, "init", "-q")
    monkeypatch.setattr(machine_probes, "PACKAGE", code)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    value, (finding,) = examine_git()
    assert value == "refused"
    assert f"safe.directory '{code.parent}'" in finding.fix


def test_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    value, (finding,) = examine_git()
    assert (value, finding.fix) == ("not installed", "install git")


def test_no_docker_engine(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    value, (finding,) = examine_docker()
    assert value == "no engine answers (only `vitpipe local` needs it)"
    assert finding.level == "note"
    assert "dvc repro" in finding.fix


def test_probes_that_fail_or_hang_keep_nothing_back():
    hangs = threading.Event()

    def fail():
        raise OSError("broken")

    def hang():
        hangs.wait(60)
        return "late", []

    found = ask_all({"one": hang, "two": fail, "three": lambda: ("fine", [])}, seconds=0.5)
    hangs.set()
    assert list(found) == ["one", "two", "three"]
    assert found["one"][0] == "no answer within 0.5 s"
    assert "two could not be examined (broken)" in found["two"][1][0].what
    assert found["three"] == ("fine", [])


def test_the_disk_beside_what_the_recipe_needs(tmp_path, monkeypatch):
    recipe = load_recipe("itpn/pixel_base", "full", ["data.root=/data"])
    run = tmp_path / "artifacts" / "itpn" / "pixel_base" / "full"
    value, _ = machine._examine_disk(tmp_path, recipe, run)
    assert value.startswith(machine.format_bytes(machine.shutil.disk_usage(tmp_path).free)[:2])
    assert "the data of itpn/pixel_base (full) need 1" in value
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 20 * 2**30}))
    _, (finding,) = machine._examine_disk(tmp_path, recipe, run)
    assert finding.level == "error"
    assert "of which 21.5 GB are free" in finding.what
    (run / "prepare").mkdir(parents=True)
    (run / "prepare" / "card.json").write_text("{}")
    assert machine._examine_disk(tmp_path, recipe, run) == (f"21.5 GB in {tmp_path / 'artifacts'}", [])
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 2**30}))
    _, (finding,) = machine._examine_disk(tmp_path, None, run)
    assert finding.level == "warning"
