"""docs/your-method.md as a user follows it: its files written, its commands run, its claims looked at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import must, planned, write

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/your-method.md").read_text(encoding="utf-8")
# A bold path, then the file's text.
FILES = re.findall(r"\*\*`([\w./-]+)`\*\*\n\n```\w+\n(.*?)```", PAGE, re.S)
RUN = PAGE.partition("## Run it")[2]
METHOD = "my_methods/methods/teacher_tokens/method.py"
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    block = re.search(r"```\n(.*?)```", RUN, re.S)
    assert block
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]


@pytest.fixture
def project(tmp_path) -> Path:
    for name, text in FILES:
        write(tmp_path / name, text)
    return tmp_path


def test_the_page_has_all_files_of_a_project():
    assert [name for name, _ in FILES] == [
        "my_methods/methods/teacher_tokens/config.py",
        METHOD,
        "my_methods/recipes/lab/mine.yaml",
        "my_methods/recipes/lab/profiles/demo.yaml",
        "my_methods/papers/lab.yaml",
        "params.yaml",
    ]


def test_both_profiles_are_valid_and_the_row_is_claimed(project):
    for profile in ("demo", "full"):
        shown = json.loads(must(project, "recipe", "lab/mine", "--profile", profile, "--json"))["recipe"]
        assert shown["pretrain"]["method"] == {"name": "teacher_tokens", "mask_ratio": 0.6, "momentum": 0.99}
    rows = must(project, "table", "lab/1", "--run", "--plan")
    assert "lab/mine" in rows


@pytest.mark.slow
def test_the_commands_in_their_order(project):
    """A minute: two nano trainings, in processes of their own."""
    environment = {**os.environ, "PATH": os.pathsep.join((str(BIN), os.environ["PATH"]))}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    subprocess.run([BIN / "dvc", "init", "-q"], cwd=project, env=environment, check=True)
    for command in commands():
        parts = command.split()
        program = [sys.executable, "-m", "vitpipe"] if parts[0] == "vitpipe" else [str(BIN / parts[0])]
        done = subprocess.run(
            [*program, *parts[1:]], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
    folder = project / "artifacts/lab/mine/demo"
    assert json.loads((folder / "pretrain/metrics.json").read_text())["loss"] > 0.0
    table = (project / "artifacts/tables/lab-1/demo/table.md").read_text()
    assert "no recipe claims this row" in table
    assert "imagenet (embedded) has" in table
    assert (project / "dvc.lock").is_file()
    # What runs again.
    assert set(planned(project).values()) == {"cached"}
    code = project / METHOD
    text = code.read_text()
    code.write_text(text.replace("# a fixed mask per image", "# the same mask whenever it is asked"))
    write(project / "my_methods/methods/other/config.py", '"""Another method."""\n')
    assert set(planned(project).values()) == {"cached"}
    code.write_text(text.replace("self.error(images, 0, indices_B)", "self.error(images, 1, indices_B)"))
    assert planned(project)["prepare"] == "cached"
    assert planned(project)["pretrain"] == planned(project)["finetune"] == "runs"


@pytest.mark.slow
def test_the_generic_tests_include_it(project):
    environment = {**os.environ, "VITPIPE_PLUGINS": str(project / "my_methods")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-k", "teacher_tokens", "-p", "no:cacheprovider",
         "tests/methods/test_every_method.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout
