"""Which Python the environment is made with: the newest of the three that really runs, or a paragraph."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "environment" / "find_python.sh"
SHIM = '#!/bin/sh\necho "pyenv: $0: command not found" >&2\nexit 127\n'


def program(path: Path, answer: str) -> Path:
    """A stand-in for a Python: prints what the script asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(answer if answer.startswith("#!") else f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def find(tmp_path):
    """(variables, arguments) -> the finished process; only what the test makes is on the path."""

    def run(*arguments, **variables):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **variables}
        # Whatever Python this machine has in /usr/bin does not count.
        program(tmp_path / "bin" / "python3", variables.pop("python3", SHIM))
        for version in ("3.11", "3.12", "3.13"):
            if not (tmp_path / "bin" / f"python{version}").exists():
                program(tmp_path / "bin" / f"python{version}", SHIM)
        if not (tmp_path / "bin" / "uv").exists():
            program(tmp_path / "bin" / "uv", SHIM)
        command = ["sh", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_the_newest_that_runs_is_taken(find, tmp_path):
    program(tmp_path / "bin" / "python3.11", "3.11")
    expected = program(tmp_path / "bin" / "python3.12", "3.12")
    found = find()  # python3.13 is a shim without a Python behind it
    assert (found.returncode, found.stdout.strip()) == (0, str(expected))


def test_pyenv_and_uv_are_looked_into(find, tmp_path):
    expected = program(tmp_path / ".pyenv" / "versions" / "3.12.4" / "bin" / "python", "3.12")
    program(tmp_path / "bin" / "python3.11", "3.11")
    assert find().stdout.strip() == str(expected)
    newest = program(tmp_path / "uv's" / "python", "3.13")
    program(tmp_path / "bin" / "uv", f'#!/bin/sh\n[ "$4" = 3.13 ] && echo "{newest}"\n')
    assert find().stdout.strip() == str(newest)


def test_the_one_that_is_named_is_taken_or_refused(find, tmp_path):
    program(tmp_path / "bin" / "python3.13", "3.13")
    old = program(tmp_path / "my python", "3.11")
    assert find(PYTHON=str(old)).stdout.strip() == str(old)
    refused = find(PYTHON=str(program(tmp_path / "older", "3.9")))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not a CPython that the locked packages exist for. Fix:" in refused.stderr


def test_no_python_is_a_paragraph_with_the_fix(find):
    found = find()
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "Fix: install one" in found.stderr


def test_the_environments_own_python_is_the_last_resort(find, tmp_path):
    own = program(tmp_path / ".venv" / "bin" / "python", "3.12")
    assert find(tmp_path / ".venv").stdout.strip() == str(own)


def test_it_looks_for_the_versions_of_the_project():
    versions = re.search(r'^versions="(.*)"$', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={versions[-1]},<3.{int(versions[0].split('.')[1]) + 1}"
    assert versions == sorted(versions, reverse=True)
    assert os.access(SCRIPT, os.X_OK)
