"""Commands in messages work when they are typed in a shell that knows nothing of the environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.address import Address
from vitpipe.contracts.shell import typed, with_typed_commands
from vitpipe.track.ui_address import ui_lines


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment whose programs print what they are; this process seems to run in it, not activated."""
    prefix = tmp_path / "my checkout" / ".venv"
    for program in ("vitpipe", "mlflow", "kfp"):
        place = prefix / "bin" / program
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f'#!/bin/sh\necho {program} "$@"\n')
        place.chmod(0o755)
    (prefix / "bin" / "dvc").write_text("#!/bin/sh\nvitpipe from dvc\n")
    (prefix / "bin" / "dvc").chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return prefix


def said_by(command: str) -> str:
    done = subprocess.run(
        ["sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.parametrize("inside", [True, False])
def test_a_clean_shell_finds_every_program(environment, tmp_path, monkeypatch, inside):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(environment.parent if inside else tmp_path / "elsewhere")
    for program in ("vitpipe", "mlflow", "kfp"):
        assert said_by(f"{typed(program)} x") == f"{program} x"
    assert said_by(typed("dvc")) == "vitpipe from dvc"  # which dvc starts by its bare name
    assert typed("vitpipe") == (".venv/bin/vitpipe" if inside else shlex.quote(f"{environment}/bin/vitpipe"))


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_activated_environment_needs_no_path(environment, monkeypatch, name):
    monkeypatch.setenv(name, "/somewhere/else")
    assert typed("vitpipe") != "vitpipe"
    monkeypatch.setenv(name, str(environment))
    assert (typed("vitpipe"), typed("dvc")) == ("vitpipe", "dvc")


def test_a_system_installation_needs_no_path(monkeypatch):
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert typed("mlflow") == "mlflow"


def test_only_commands_in_code_are_changed(environment, monkeypatch):
    monkeypatch.chdir(environment.parent)
    text = "vitpipe: run `vitpipe plan`, `dvc push` or `vitpipe`; see `vitpipe-dev`, `x vitpipe y` and mlflow"
    assert with_typed_commands(text) == (
        "vitpipe: run `.venv/bin/vitpipe plan`, `PATH=$PWD/.venv/bin:$PATH dvc push` or `.venv/bin/vitpipe`; "
        "see `vitpipe-dev`, `x vitpipe y` and mlflow"
    )


def test_the_address_of_the_store_is_one_word(environment, monkeypatch):
    monkeypatch.chdir(environment.parent)
    database = environment.parent / "a b.db"
    command = ui_lines(Address(f"sqlite:///{database}"))[0].removeprefix("MLflow: ")
    assert said_by(command) == "mlflow ui --backend-store-uri sqlite:///a b.db"


def test_the_command_line_prints_them_so(tmp_path):
    command = [sys.executable, "-m", "vitpipe", "plan", "--recipe", "itpn/no_such_recipe"]
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    if sys.prefix != sys.base_prefix:
        assert f"`{Path(sys.prefix)}/bin/vitpipe recipes`" in done.stderr
