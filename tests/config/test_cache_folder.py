"""Where compiled code is kept, on machines that let nothing be written: nothing fails, it only takes longer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vitpipe.config.cache_folder import writable_cache_folder

# A container with a read-only file system: neither the package nor any cache folder can be written.
READ_ONLY = (
    "import os\n"
    "from pathlib import Path\n"
    "from vitpipe.config import cache_folder\n"
    "cache_folder.writable_cache_folder = lambda name: None\n"
    "real = os.access\n"
    "os.access = lambda path, mode: not str(path).endswith('data') and real(path, mode)\n"
    "from vitpipe.data import resize_kernels\n"
    "resize_kernels.warm_up()\n"
    "print(resize_kernels.weights_of(3, 2, 1.0) is not None, os.listdir())\n"
)


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A cache folder that is not there yet, and a folder for temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))
    return tmp_path / "cache", temporary


def test_the_cache_folder_is_made(places):
    cache, temporary = places
    assert writable_cache_folder("numba") == cache / "numba"
    assert (cache / "numba").is_dir()
    assert list(temporary.iterdir()) == []


def test_the_temporary_folder_takes_its_place(places):
    cache, temporary = places
    cache.write_text("a file where the folder should be")
    found = writable_cache_folder("numba")
    assert found == temporary / f"vitpipe-{os.getuid()}" / "numba"
    assert found.stat().st_mode & 0o077 == 0 or found.parent.stat().st_mode & 0o077 == 0


def test_without_either_there_is_none(places, monkeypatch):
    cache, temporary = places
    cache.write_text("a file")
    (temporary / f"vitpipe-{os.getuid()}").write_text("a file, too")
    assert writable_cache_folder("numba") is None

    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert writable_cache_folder("numba") is None


def test_the_working_folder_is_no_temporary_folder(places, monkeypatch):
    """Python takes it as its last resort; it is the user's."""
    cache, temporary = places
    cache.write_text("a file")
    monkeypatch.chdir(temporary)
    assert writable_cache_folder("numba") is None
    assert list(temporary.iterdir()) == []


def test_code_in_another_users_folder_is_not_executed(places, monkeypatch):
    cache, temporary = places
    cache.write_text("a file")
    victim = os.getuid() + 1
    planted = temporary / f"vitpipe-{victim}" / "numba"
    planted.mkdir(parents=True)  # by the user who runs this test, under the other one's name
    planted.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: victim)
    assert writable_cache_folder("numba") is None


def test_kernels_are_compiled_where_nothing_can_be_kept(tmp_path):
    done = subprocess.run([sys.executable, "-c", READ_ONLY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "[]"]
