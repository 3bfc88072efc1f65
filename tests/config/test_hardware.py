"""What a card names of the machine: the limits of a container, in both versions of control groups."""

from __future__ import annotations

import os

import pytest

from vitpipe.config import digest
from vitpipe.config import hardware as place
from vitpipe.config.hardware import cpu_limit, hardware, memory_limit

UNLIMITED_V1 = "9223372036854771712"


def _files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n")
    return folder


@pytest.mark.parametrize(
    ("contents", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": 4 * 2**30}, 1.5, 4 * 2**30),
        ({"cpu.max": "200000 100000", "memory.max": "max"}, 2, None),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (
            {"cpu/cpu.cfs_quota_us": 100000, "cpu/cpu.cfs_period_us": 100000,
             "memory/memory.limit_in_bytes": 2**30},
            1, 2**30,
        ),
        ({"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, None, None),
        ({}, None, None),
        ({"cpu.max": "", "memory.max": "?"}, None, None),
    ],
)  # fmt: skip
def test_the_limits_of_a_control_group(tmp_path, contents, cores, memory):
    group = _files(tmp_path, contents)
    assert (cpu_limit(group), memory_limit(group)) == (cores, memory)


def test_a_limit_counts_where_it_is_below_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "_GROUP", tmp_path)
    whole = hardware()
    assert whole["num_cores"] == len(os.sched_getaffinity(0))
    monkeypatch.setattr(
        place, "_GROUP", _files(tmp_path / "b", {"cpu.max": "50000 100000", "memory.max": 2**29})
    )
    assert (hardware()["num_cores"], hardware()["memory_gib"]) == (0.5, 0.5)
    unlimited = _files(tmp_path / "c", {"memory/memory.limit_in_bytes": UNLIMITED_V1})
    monkeypatch.setattr(place, "_GROUP", unlimited)
    assert hardware() == whole


def test_an_image_names_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "PACKAGE", tmp_path)  # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    digest.git_commit.cache_clear()
    try:
        assert digest.git_commit() == "unknown"
        digest.git_commit.cache_clear()
        monkeypatch.setenv("VITPIPE_COMMIT", "a" * 40)
        assert digest.git_commit() == "a" * 40
    finally:
        digest.git_commit.cache_clear()
