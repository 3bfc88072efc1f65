"""The cache of remote ranges: bounded, shared without locks, verified by checksums, suspended by disk errors."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.errors import InputError
from vitpipe.data.storage import cache as cache_module
from vitpipe.data.storage.cache import RangeCache, shard_cache

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def cache(tmp_path):
    return RangeCache(tmp_path / "cache", 10**8)


def test_what_was_written_is_read_and_the_rest_is_a_hole(cache):
    assert cache.read(KEY, 5, 3) is None
    cache.write(KEY, 10**9, b"abc")
    assert cache.read(KEY, 10**9, 3) == b"abc"
    assert cache.read(KEY, 10**9 - 2, 5) == b"\0\0abc"
    assert cache.read(KEY, 10**9, 4) is None
    assert cache.read(OTHER, 0, 3) is None
    assert cache.size_bytes <= 2 * 4096  # a gigabyte of holes costs nothing


@given(
    st.lists(st.tuples(st.sampled_from([KEY, OTHER]), st.integers(0, 50), st.integers(1, 40)), max_size=20)
)
def test_any_order_of_writes(tmp_path_factory, ranges):
    cache = RangeCache(tmp_path_factory.mktemp("any"), 10**8)
    content = {key: random.Random(key).randbytes(100) for key in (KEY, OTHER)}
    for key, offset, size in ranges:
        cache.write(key, offset, content[key][offset : offset + size])
    for key, offset, size in ranges:
        assert cache.read(key, offset, size) == content[key][offset : offset + size]


def test_the_bound_is_kept_and_the_least_recently_used_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_TOUCH_SECONDS", 0.0)
    cache = RangeCache(tmp_path, 2_000_000)
    favourite = f"{0:064x}"
    cache.write(favourite, 0, b"x" * 50_000)
    for number in range(1, 101):
        time.sleep(0.002)  # a new modification time
        assert cache.read(favourite, 0, 50_000) is not None
        cache.write(f"{number:064x}", 7, b"y" * 50_000)
        assert cache.size_bytes <= 2_000_000
    kept = sorted(int(path.stem, 16) for path in tmp_path.iterdir())
    assert kept == [0, *range(100 - len(kept) + 2, 101)]
    assert cache.size_bytes >= 0.8 * 2_000_000


WRITER = """
import random, sys
from pathlib import Path
from vitpipe.data.storage.cache import RangeCache
cache, chance = RangeCache(Path(sys.argv[1]), 3_000_000), random.Random(sys.argv[2])
print("up", flush=True)
for _ in range(int(sys.argv[3])):
    key, place = chance.randrange(40), chance.randrange(30)
    expected = bytes([key + 1, place + 1]) * 10_000
    found = cache.read(f"{key:064x}", place * 20_000, 20_000)
    # Another process may be in the middle of writing: some of it is there, the rest is still a hole.
    if found not in (None, expected) and any(a not in (0, b) for a, b in zip(found, expected)):
        sys.exit("wrong bytes")
    if found != expected:
        cache.write(f"{key:064x}", place * 20_000, expected)
"""


def test_processes_write_read_and_delete_at_once(tmp_path):
    """What is found is holes or the right bytes, and all together keep the bound."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(n), "1500"], stdout=subprocess.PIPE
        )
        for n in range(3)
    ]
    cache, largest = RangeCache(tmp_path, 3_000_000), 0
    while any(process.poll() is None for process in processes):
        largest = max(largest, cache.size_bytes)
        time.sleep(0.005)
    assert [process.wait() for process in processes] == [0, 0, 0]
    for process in processes:
        process.stdout.close()
    assert 1_000_000 < largest <= 3_000_000


def test_a_file_that_another_process_deleted_is_begun_again(cache):
    cache.write(KEY, 0, b"first")
    Path(cache._path(KEY)).unlink()
    assert cache.read(KEY, 0, 5) is None
    cache.write(KEY, 0, b"again")
    assert RangeCache(cache.folder, 10**8).read(KEY, 0, 5) == b"again"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_error_suspends_the_cache(cache, monkeypatch, number):
    cache.write(KEY, 0, b"kept" * 100_000)
    cache.write(OTHER, 0, b"kept" * 100_000)
    real = os.pwrite

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.warns(UserWarning, match="is not used for 60 s.*VITPIPE_CACHE_GB"):
        cache.write(KEY, 10**6, b"new")
    left = [key for key in (KEY, OTHER) if cache.read(key, 0, 4) == b"kept"]
    assert len(left) == (1 if number == errno.ENOSPC else 2)  # a full disk gets some space back
    monkeypatch.setattr(os, "pwrite", real)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write(KEY, 10**6, b"new")
    assert cache.read(KEY, 10**6, 3) != b"new"
    cache._suspended_until = 0.0
    cache.write(KEY, 10**6, b"new")
    assert cache.read(KEY, 10**6, 3) == b"new"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    cache = RangeCache(tmp_path / "file" / "cache", 10**8)
    with pytest.warns(UserWarning, match="is not used"):
        cache.write(KEY, 0, b"x")
    assert cache.read(KEY, 0, 1) is None
    with pytest.warns(UserWarning, match="is not used"):
        assert cache.index(KEY, 1, lambda: [b"x"], check=True) is None


def test_a_disk_filled_by_other_files_empties_the_cache(cache, monkeypatch):
    cache.write(KEY, 0, b"x" * 100_000)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    cache._allowance_bytes = 0
    with pytest.warns(UserWarning, match="is not used"):
        cache.write(OTHER, 0, b"y" * 100_000)
    assert cache.size_bytes == 0


def test_an_index_is_fetched_once_verified_and_replaced_when_damaged(cache):
    content = os.urandom(5000)
    sha256, fetched = hashlib.sha256(content).hexdigest(), []

    def fetch(*answers):
        def blocks():
            fetched.append(1)
            yield answers[min(len(fetched), len(answers)) - 1]

        return blocks

    path = cache.index(sha256, 5000, fetch(b"damaged on the way", content), check=True)
    assert path is not None
    assert path.read_bytes() == content
    assert len(fetched) == 2
    assert cache.index(sha256, 5000, fetch(content), check=True) == path
    assert len(fetched) == 2
    path.write_bytes(bytes(5000))
    assert cache.index(sha256, 5000, fetch(content), check=False) == path
    assert len(fetched) == 2
    assert cache.index(sha256, 5000, fetch(content), check=True).read_bytes() == content
    assert len(fetched) == 3
    assert cache.index("c" * 64, 5000, fetch(content), check=True) is None
    assert [entry.name for entry in cache.folder.iterdir()] == [path.name]


def test_indexes_are_evicted_last(cache):
    content = bytes(300_000)
    path = cache.index(hashlib.sha256(content).hexdigest(), len(content), lambda: [content], check=True)
    small = RangeCache(cache.folder, 500_000)
    for number in range(10):
        small.write(f"{number:064x}", 0, b"z" * 50_000)
    assert path.is_file()
    assert small.size_bytes <= 500_000


def test_it_can_be_pickled_and_switched_off(cache, tmp_path):
    cache.write(KEY, 0, b"abc")
    assert pickle.loads(pickle.dumps(cache)).read(KEY, 0, 3) == b"abc"
    off = RangeCache(tmp_path / "off", 0)
    off.write(KEY, 0, b"abc")
    assert not (tmp_path / "off").exists()


def test_place_and_size_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("VITPIPE_CACHE", raising=False)
    monkeypatch.delenv("VITPIPE_CACHE_GB", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shard_cache().folder == tmp_path / ".cache" / "vitpipe" / "shards"
    assert shard_cache().limit_bytes == 50 * 10**9
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("VITPIPE_CACHE_GB", "0.5")
    assert (shard_cache().folder, shard_cache().limit_bytes) == (tmp_path / "c" / "shards", 5 * 10**8)
    for nonsense in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("VITPIPE_CACHE_GB", nonsense)
        with pytest.raises(InputError, match=f"VITPIPE_CACHE_GB is '{nonsense}'"):
            shard_cache()
