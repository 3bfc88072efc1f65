"""Shards on a real S3 protocol server: the same bytes as local ones, from the cache the second time."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_server import s3, s3_gate, s3_port  # noqa: F401
from tiny_shards import picture, send, write_set

from vitpipe.contracts.errors import DatasetError, StorageError
from vitpipe.data.batches import train_batches
from vitpipe.data.manifest import write_manifest
from vitpipe.data.shards import open_shards, verify_checksums
from vitpipe.data.storage.s3 import S3Storage

pytestmark = pytest.mark.slow

STORE = "s3://shards/sets/imagenet"
LAST = "train-000003.tar"


@pytest.fixture
def local(tmp_path):
    write_set(tmp_path / "local")
    return tmp_path / "local"


@pytest.fixture
def remote(s3, local, tmp_path):  # noqa: F811
    """A prepared folder that holds manifests only."""
    manifest = write_set(tmp_path / "packed", store=STORE)
    assert send(tmp_path / "packed" / "imagenet", manifest) == 10
    (tmp_path / "remote" / "imagenet").mkdir(parents=True)
    write_manifest(tmp_path / "remote" / "imagenet", manifest)
    s3.counts.clear()
    return tmp_path / "remote"


@pytest.fixture
def shards(remote, s3):  # noqa: F811
    shards = open_shards(remote, "imagenet", "train")
    s3.counts.clear()
    yield shards
    shards.close()


def cached_files(shards) -> list[Path]:
    return sorted(shards.cache.folder.glob("*.shard"))


def test_opening_costs_one_listing_and_the_index(remote, s3):  # noqa: F811
    shards = open_shards(remote, "imagenet", "train")
    assert s3.counts == {"GET": 1, "RANGE": 1}
    assert shards.digest == write_set(remote / "again").digest  # where it lies does not count
    assert shards.labels.tolist() == [n % 3 for n in range(30)]
    open_shards(remote, "imagenet", "train")
    pickle.loads(pickle.dumps(shards))
    assert s3.counts == {"GET": 2, "RANGE": 1}


def test_the_second_time_everything_comes_from_the_cache(shards, s3, local):  # noqa: F811
    expected = open_shards(local, "imagenet", "train")
    order = np.random.default_rng(0).permutation(30).tolist()
    assert [shards.read(position) for position in order] == [expected.read(position) for position in order]
    assert s3.counts == {"RANGE": 30}
    assert shards.read_many(range(30)) == expected.read_many(range(30))
    assert pickle.loads(pickle.dumps(shards)).decode(4)[0].tobytes() == expected.decode(4)[0].tobytes()
    assert s3.counts == {"RANGE": 30}
    assert len(cached_files(shards)) == 4


def test_many_are_asked_for_at_the_same_time(shards, s3):  # noqa: F811
    shards.read_many((4, 5))
    s3.together = threading.Barrier(16)
    positions = (5, *range(20, 28), 4, *range(10, 18))
    assert [sample.image_bytes for sample in shards.read_many(positions)] == [picture(n) for n in positions]
    assert s3.counts == {"RANGE": 18}


def test_a_forked_process_reads_on_its_own(shards):
    expected = shards.read_many(range(8))
    child = os.fork()
    if child == 0:
        same = shards.read_many(range(8)) == expected
        more = [sample.image_bytes for sample in shards.read_many(range(8, 20))]
        os._exit(0 if same and more == [picture(n) for n in range(8, 20)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_damaged_cache_entries_are_fetched_again(shards, s3):  # noqa: F811
    good = shards.read_many(range(30))
    for number, file in enumerate(cached_files(shards)):
        content = bytearray(file.read_bytes())
        if number == 0:
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    assert shards.read_many(range(30)) == good
    num_again = s3.counts["RANGE"] - 30
    assert 3 <= num_again <= 10
    assert shards.read_many(range(30)) == good
    assert s3.counts["RANGE"] == 30 + num_again


def test_a_damaged_index_in_the_cache_is_replaced_when_the_set_is_opened(remote, shards):
    (index,) = shards.cache.folder.glob("*.index")
    index.write_bytes(bytes(len(index.read_bytes())))
    assert open_shards(remote, "imagenet", "train").read(3).image_bytes == picture(3)


def test_bytes_that_change_on_the_way_are_asked_for_once_more(shards, s3):  # noqa: F811
    s3.faults.extend(["corrupt"])
    assert shards.read(3).image_bytes == picture(3)
    s3.faults.extend(["corrupt"] * 2)
    with pytest.raises(
        DatasetError, match=r"image 7 has changed.*s3://shards/sets/imagenet/train-000000\.tar"
    ):
        shards.read(7)
    assert shards.read(7).image_bytes == picture(7)


def test_transient_errors_are_retried(shards, s3):  # noqa: F811
    s3.faults.extend(["500", "short", "reset", "SlowDown", "short"])
    assert [sample.image_bytes for sample in shards.read_many(range(5))] == [picture(n) for n in range(5)]
    assert s3.counts["RANGE"] == 10


def test_files_that_differ_from_the_manifest_are_named(remote, tmp_path):
    storage = S3Storage(STORE)
    short = tmp_path / "short"
    short.write_bytes(b"short")
    storage.put(short, LAST, "f9b0078b5df596d2ea19010c001bbd009e651de2c57e8fb7e355f31eb9d3f739")
    with pytest.raises(DatasetError, match=rf"has 5 bytes instead of.*{STORE}/{LAST}.*sends missing"):
        open_shards(remote, "imagenet", "train")
    with pytest.raises(DatasetError, match=rf"Checksums differ: {LAST}\."):
        verify_checksums(remote, "imagenet")
    open_shards(remote, "imagenet", "val")
    assert send(tmp_path / "packed" / "imagenet", write_set(tmp_path / "packed", store=STORE)) == 1
    assert verify_checksums(remote, "imagenet") == verify_checksums(tmp_path / "local", "imagenet")


def test_a_wrong_address_is_an_error_at_once(remote):
    manifest = remote / "imagenet" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("s3://shards/", "s3://elsewhere/"))
    with pytest.raises(DatasetError, match=r"bucket 'elsewhere' does not exist"):
        open_shards(remote, "imagenet", "train")
    manifest.write_text(manifest.read_text().replace("s3://elsewhere/", "s3://shards/wrong/"))
    with pytest.raises(DatasetError, match=r"A shard is missing.*s3://shards/wrong/"):
        open_shards(remote, "imagenet", "train")


def test_a_cache_that_cannot_be_used_changes_nothing(remote, s3, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not used for 60 s"):
        shards = open_shards(remote, "imagenet", "train")
    for _ in range(2):
        assert [sample.image_bytes for sample in shards.read_many(range(6))] == [picture(n) for n in range(6)]
    assert s3.counts["RANGE"] == 1 + 12
    s3.faults.extend(["corrupt"] * 3)
    with (
        pytest.warns(UserWarning, match="."),
        pytest.raises(DatasetError, match=r"checksum of the index differs.*train\.index"),
    ):
        open_shards(remote, "imagenet", "train")


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def batches(shards, *, workers, start_step=0):
    place = {"global_batch": 8, "micro_batch": 4, "rank": 0, "num_ranks": 1, "num_steps": 6}
    return list(train_batches(shards, pixels, seed=3, start_step=start_step, workers=workers, **place))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices_B, b.indices_B)
        assert a.moment == b.moment


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_shards_also_in_the_middle_of_an_epoch(shards, local, workers):
    expected = batches(open_shards(local, "imagenet", "train"), workers=0)
    assert_same(batches(shards, workers=workers), expected)
    assert_same(batches(shards, workers=workers, start_step=2), expected[4:])


def test_batches_while_the_cache_overflows(remote, local, monkeypatch):
    """Room for two shards of four: every process deletes what the others read."""
    monkeypatch.setenv("VITPIPE_CACHE_GB", "0.00004")
    shards = open_shards(remote, "imagenet", "train")
    assert_same(batches(shards, workers=2), batches(open_shards(local, "imagenet", "train"), workers=0))
    assert 0 < shards.cache.size_bytes <= 40_000


def test_a_failing_storage_ends_the_training_without_a_traceback(shards, s3):  # noqa: F811
    s3.faults.extend(["500"] * 1000)
    with pytest.raises(StorageError, match=r"fails \(InternalError\); tried 10 times") as caught:
        batches(shards, workers=1)
    assert "Traceback" not in str(caught.value)
