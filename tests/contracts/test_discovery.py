"""Plugins: found like our own files, and refused where they would be used silently or never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.discovery import files_in, source_of, use_plugins
from vitpipe.contracts.errors import InputError

PROGRAM = """
from pathlib import Path
from vitpipe.contracts.discovery import files_in, names_in, part_of, use_plugins
use_plugins([Path("mine")])
print(names_in("vitpipe.methods"), part_of("vitpipe.methods", "byol", "config", "NAME"))
print([path.name for path in files_in("recipes", "lab/*.yaml")])
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "import vitpipe.methods.byol.config as c;"
    "print(c.NAME)"], capture_output=True, text=True, check=True).stdout)
"""


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_plugin_is_found_here_and_in_child_processes(tmp_path: Path) -> None:
    write(tmp_path / "mine/methods/byol/config.py", '"""Settings."""\nNAME = "BYOL"\n')
    write(tmp_path / "mine/recipes/lab/byol.yaml")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "byol" in done.stdout
    assert done.stdout.count("BYOL") == 2
    assert "['byol.yaml']" in done.stdout


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "does not exist"),
        (("notes/readme.txt",), "none of the folders"),
        (("contracts/errors.py",), "has the name of a file"),
        (("methods/mine.py", "recipes/itpn/pixel_base.yaml"), "has the name of a file"),
        (("methods/classify.py",), "has the name of a file"),
        (("stages/training/config.py",), "has the name of a file"),
    ],
)
def test_a_folder_that_cannot_be_a_plugin_is_refused(
    tmp_path: Path, files: tuple[str, ...], what: str
) -> None:
    for name in files:
        write(tmp_path / "mine" / name)
    before = os.environ.get("VITPIPE_PLUGINS")
    with pytest.raises(InputError, match=what):
        use_plugins([tmp_path / "mine"], "params.yaml")
    assert os.environ.get("VITPIPE_PLUGINS") == before


def test_a_path_that_the_variable_would_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a:b/methods/byol/config.py")
    with pytest.raises(InputError, match="cannot hold ':'"):
        use_plugins([tmp_path / "a:b"])


def test_files_and_sources_are_found_without_importing() -> None:
    assert [path.stem for path in files_in("recipes", "itpn/pixel_*.yaml")] == ["pixel_base", "pixel_large"]
    assert source_of("vitpipe.models.hivit.family") is not None
    assert source_of("vitpipe.models.hivit") is not None
    assert source_of("vitpipe.models.nowhere") is None
