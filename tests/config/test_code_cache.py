"""The cache of parsed sources changes how long an identity takes, and never what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.config import code_cache, code_identity
from vitpipe.config.cache_folder import cache_folder
from vitpipe.config.code_cache import CodeCache, key_of
from vitpipe.config.code_identity import closure_of

MODULE = "vitpipe.train.loop"
IN_A_PROCESS = (
    "from vitpipe.config import code_identity as c\n"
    "calls, read = [], c._read_file\n"
    "c._read_file = lambda *given: calls.append(1) or read(*given)\n"
    f"found = c.closure_of(['{MODULE}'])\n"
    "print(len(calls), c.code_digest(found, {}))\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own, empty."""
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "cache"))
    code_cache.code_cache.cache_clear()
    code_identity._parsed.cache_clear()
    yield tmp_path / "cache"
    code_cache.code_cache.cache_clear()


def in_a_process() -> tuple[int, str]:
    """Number of files that a new process has parsed, and the digest it found."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=True)
    calls, digest = done.stdout.split()
    return int(calls), digest


def test_a_second_process_parses_nothing_and_finds_the_same(folder):
    first, digest = in_a_process()
    assert first > 20
    assert in_a_process() == (0, digest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: json.dumps({key: [1] for key in json.loads(text)}),
        lambda text: text.replace("[", "7, [", 1),
        lambda text: "",
    ],
    ids=["half", "no mapping", "other values", "no JSON", "empty"],
)
def test_a_damaged_cache_is_read_as_none(folder, damage):
    _, digest = in_a_process()
    file = folder / "code.json"
    file.write_text(damage(file.read_text()))
    assert in_a_process()[1] == digest


def test_a_cache_that_cannot_be_written_changes_nothing(folder):
    _, digest = in_a_process()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    assert in_a_process()[1] == digest


def test_every_content_has_its_own_entry(folder, tmp_path):
    file = tmp_path / "module.py"
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n", "a = 1  # a comment\n"):
        file.write_text(text)
        code_identity._parsed.cache_clear()
        digests.append(code_identity.code_file(file, "vitpipe.module").digest)
    assert digests[0] == digests[2] == digests[3] != digests[1]
    # Of a package's own file, a relative import means another module.
    assert key_of(b"a", "vitpipe") != key_of(b"a", "vitpipe.module") != key_of(b"b", "vitpipe.module")


def test_the_oldest_entries_are_dropped(folder, monkeypatch):
    monkeypatch.setattr(code_cache, "_MAX_ENTRIES", 2)
    cache = CodeCache(folder / "code.json")
    for key in "abc":
        cache.put(key, [key])
    cache.save()
    again = CodeCache(folder / "code.json")
    assert [again.get(key) for key in "abc"] == [None, ["b"], ["c"]]


def test_two_processes_keep_the_entries_of_each_other(folder):
    one, other = CodeCache(folder / "code.json"), CodeCache(folder / "code.json")
    one.put("a", 1)
    other.put("b", 2)
    one.save()
    other.save()
    again = CodeCache(folder / "code.json")
    assert (again.get("a"), again.get("b")) == (1, 2)


def test_a_user_without_a_home_has_a_cache_too(monkeypatch):
    monkeypatch.delenv("VITPIPE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder().name == f"vitpipe-{os.getuid()}"


def test_a_closure_is_the_same_with_and_without_entries(folder):
    first = closure_of([MODULE])
    code_identity._parsed.cache_clear()
    assert closure_of([MODULE]) == first
