"""Folders in which DVC cannot work are refused before it starts, with the fix; all others are let alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.errors import InputError
from vitpipe.stages.identity import check_dvc_folder

BROKEN = {
    "{x}": "holds '{'",
    "a}b": "holds '}'",
    "{0:>5}": "holds '{'",
    os.fsdecode(b"caf\xe9"): "is not text in UTF-8",
}
# Tried with DVC 3.67.
FINE = ["plain", "%s", "a%20b", "#h", "$HOME", "it's", '"q"', "a b", "[x]", "a*b", "a\nb", "\\b", "café"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_breaks_dvc_is_refused(name, tmp_path):
    folder = tmp_path / name / "project"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):  # DVC follows links
        with pytest.raises(InputError) as refused:
            check_dvc_folder(place)
        assert f"DVC cannot work in this folder: its path {BROKEN[name]}. Where: " in str(refused.value)
        assert "Fix: rename that folder" in str(refused.value)


@pytest.mark.parametrize("name", FINE)
def test_a_folder_in_which_dvc_works_is_let_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    check_dvc_folder(tmp_path / name)


@pytest.fixture
def project(tmp_path):
    """A project in a folder with braces."""
    folder = tmp_path / "{x}"
    (folder / ".dvc").mkdir(parents=True)
    (folder / "params.yaml").write_text("recipe: itpn/pixel_base\nprofile: demo\n")
    (folder / "dvc.yaml").write_text("# vitpipe compile --dvc\nstages: {}\n")
    return folder


def vitpipe(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code and what was printed on stdout and stderr, each on one line."""
    command = [sys.executable, "-m", "vitpipe", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


@pytest.mark.parametrize("verb", [("repro",), ("compile", "--dvc"), ("identity",)], ids=" ".join)
def test_verbs_that_dvc_needs_refuse_it_before_anything_is_written(verb, project):
    before = sorted(project.rglob("*"))
    code, _, said = vitpipe(project, *verb)
    assert code == 2
    assert said.startswith("vitpipe: DVC cannot work in this folder: its path holds '{'. Where: ")
    assert sorted(project.rglob("*")) == before


def test_plan_warns_and_doctor_finds_it(project):
    code, shown, said = vitpipe(project, "plan")
    assert code == 0
    assert "prepare" in shown
    assert said.startswith("warning: DVC cannot work in this folder: its path holds '{'")
    _, shown, _ = vitpipe(project, "doctor")
    assert "error: DVC cannot work in this folder: its path holds '{'" in shown
