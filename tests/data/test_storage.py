"""Files by range from a folder and from a real S3 protocol server, with everything that can go wrong there."""

from __future__ import annotations

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import s3, s3_gate, s3_port  # noqa: F401

from vitpipe.contracts.errors import DatasetError, StorageError
from vitpipe.data.storage import s3 as s3_module
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.data.storage.s3 import S3Storage
from vitpipe.data.storage.storage import LocalStorage

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def remote(s3, file):  # noqa: F811
    storage = S3Storage("s3://shards/some/prefix")
    storage.put(file, "a.tar", SHA256)
    s3.counts.clear()
    return storage


def test_the_address_decides(tmp_path):
    assert isinstance(storage_of(tmp_path, None), LocalStorage)
    assert storage_of(tmp_path, "s3://bucket/x/").place("a.tar") == "s3://bucket/x/a.tar"
    for address in (
        "bucket/x",
        "s3://",
        "http://host/x",
        "s3://key:secret@b/x",
        "s3://key:se/cret@b",
        "s3://b?t=secret",
    ):
        with pytest.raises(
            DatasetError, match=r"not the address of an object storage.*s3://bucket/prefix"
        ) as caught:
            storage_of(tmp_path, address)
        assert "cret@" not in str(caught.value)


@given(offset=st.integers(0, len(CONTENT) - 1), size_bytes=st.integers(0, len(CONTENT) + 10))
def test_a_local_range(tmp_path_factory, offset, size_bytes):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.tar").write_bytes(CONTENT)
    assert LocalStorage(folder).read("a.tar", offset, size_bytes) == CONTENT[offset : offset + size_bytes]


def test_ranges_of_an_object(remote, s3):  # noqa: F811
    for offset, size_bytes in ((0, 1), (17, 300), (len(CONTENT) - 5, 5), (len(CONTENT) - 5, 50), (9, 0)):
        assert remote.read("a.tar", offset, size_bytes) == CONTENT[offset : offset + size_bytes]
    assert s3.counts == {"RANGE": 4}


def test_both_kinds_tell_sizes_and_copy(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("vitpipe.data.storage.storage._BLOCK_BYTES", 1000)
    for number, storage in enumerate((LocalStorage(tmp_path), remote)):
        assert storage.sizes() == {"a.tar": len(CONTENT)}
        assert (storage.size_bytes("a.tar"), storage.size_bytes("b.tar")) == (len(CONTENT), None)
        (tmp_path / "to").mkdir(exist_ok=True)
        storage.fetch("a.tar", tmp_path / "to" / str(number))
        assert (tmp_path / "to" / str(number)).read_bytes() == CONTENT
        with pytest.raises(DatasetError):
            storage.fetch("b.tar", tmp_path / "to" / "b")
        storage.close()
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["0", "1"]


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_file_is_stored_once_and_again_when_it_differs(s3, file, tmp_path, where):  # noqa: F811
    storage = LocalStorage(tmp_path / "store") if where == "folder" else S3Storage("s3://shards/p")
    assert storage.put(file, "a.tar", SHA256)
    assert not storage.put(file, "a.tar", SHA256)
    file.unlink()  # a folder may hold the very file, as a link: packed files are replaced, never written to
    file.write_bytes(CONTENT[::-1])
    with pytest.raises(DatasetError, match=r"changed since it was packed.*a\.tar"):
        storage.put(file, "b.tar", SHA256)
    assert list(storage.sizes()) == ["a.tar"]
    assert storage.put(file, "a.tar", hashlib.sha256(CONTENT[::-1]).hexdigest())
    assert storage.read("a.tar", 0, 3) == CONTENT[::-1][:3]


def test_a_large_file_goes_in_parts_and_is_checked_without_reading_it_back(s3, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(s3_module, "_PART_BYTES", 5 * 2**20)
    for size in (5 * 2**20 - 1, 5 * 2**20, 11 * 2**20):
        path = tmp_path / "big"
        path.write_bytes(os.urandom(size))
        assert S3Storage("s3://shards").put(
            path, f"big-{size}", hashlib.sha256(path.read_bytes()).hexdigest()
        )
    assert s3.counts["RANGE"] == 0
    assert s3.counts["PUT"] == 1 + 1 + 3


def test_an_upload_that_arrives_damaged_is_sent_again(s3, file, monkeypatch):  # noqa: F811
    real, tags = s3_module._file_digests, iter(["other"] * 2)
    monkeypatch.setattr(s3_module, "_file_digests", lambda path: (real(path)[0], next(tags)))
    s3.faults.extend(["corrupt"])  # the tag does not match, so the object is read back, once wrongly
    assert S3Storage("s3://shards").put(file, "a.tar", SHA256)
    assert (s3.counts["PUT"], s3.counts["RANGE"]) == (2, 2)


@pytest.mark.parametrize("fault", ["500", "SlowDown", "short", "reset"])
def test_transient_errors_are_retried(remote, s3, fault):  # noqa: F811
    s3.faults.extend([fault] * 3)
    assert remote.read("a.tar", 10, 100) == CONTENT[10:110]
    assert s3.counts["RANGE"] == 4


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_uploads_and_listings_are_retried(s3, file, fault):  # noqa: F811
    s3.fault_at = ("PUT", "HEAD", "GET")
    storage = S3Storage("s3://shards/q")
    s3.faults.extend([fault] * 2)
    assert storage.put(file, "a.tar", SHA256)
    s3.faults.extend([fault] * 2)
    assert storage.sizes() == {"a.tar": len(CONTENT)}
    assert not s3.faults


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("SlowDown", "fails .SlowDown."),
        ("short", "sends incomplete data|does not respond"),
        ("reset", "does not respond"),
    ],
)
def test_lasting_failures_become_one_error(remote, s3, fault, words):  # noqa: F811
    s3.faults.extend([fault] * 100)
    with pytest.raises(
        StorageError, match=rf"({words}).*tried 10 times.*shards/some/prefix/a\.tar.*AWS_ENDPOINT_URL"
    ):
        remote.read("a.tar", 0, 10)
    assert s3.counts["RANGE"] == 10


def test_pauses_grow_and_differ(remote, s3, monkeypatch):  # noqa: F811
    pauses = []
    monkeypatch.setattr(s3_module, "_FIRST_PAUSE_SECONDS", 0.25)
    monkeypatch.setattr(s3_module, "time", SimpleNamespace(sleep=pauses.append, monotonic=lambda: 0.0))
    s3.faults.extend(["500"] * 9)
    remote.read("a.tar", 0, 10)
    longest = [min(0.25 * 2**n, 20.0) for n in range(9)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == 9


def test_what_does_not_exist_is_named(remote, s3, file):  # noqa: F811
    with pytest.raises(DatasetError, match=r"does not exist.*s3://shards/some/prefix/b\.tar"):
        remote.read("b.tar", 0, 10)
    with pytest.raises(DatasetError, match="too short"):
        remote.read("a.tar", len(CONTENT), 10)
    absent = S3Storage("s3://absent/p")
    calls = (
        absent.sizes,
        lambda: absent.size_bytes("a"),
        lambda: absent.read("a", 0, 1),
        lambda: absent.put(file, "a", SHA256),
    )
    for call in calls:
        with pytest.raises(DatasetError, match=r"bucket 'absent' does not exist.*data\.store"):
            call()
    assert s3.counts["RANGE"] == 3  # none of this is tried again


def test_without_credentials(remote, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"Credentials .* are missing.*AWS_ACCESS_KEY_ID"):
        remote.read("a.tar", 0, 10)


def test_denied_access(remote, s3, monkeypatch):  # noqa: F811
    from botocore.exceptions import ClientError

    def refuse(**_):
        raise ClientError(
            {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject"
        )

    monkeypatch.setattr(s3_module._client(), "get_object", refuse)
    with pytest.raises(StorageError, match=r"denies access \(AccessDenied\).*permission to list"):
        remote.read("a.tar", 0, 10)


def test_an_endpoint_that_does_not_listen(remote, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port
    with pytest.raises(StorageError, match=r"does not respond.*tried 4 times.*127\.0\.0\.1:9"):
        remote.sizes()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StorageError, match=r"address .* is invalid.*AWS_ENDPOINT_URL"):
        remote.sizes()


def test_a_server_without_range_requests(remote, monkeypatch):
    whole = {"Body": SimpleNamespace(), "ContentLength": 9}
    body = boto3.session.Session().client("s3").get_object(Bucket="shards", Key="some/prefix/a.tar")["Body"]
    monkeypatch.setattr(s3_module._client(), "get_object", lambda **_: {**whole, "Body": body})
    with pytest.raises(StorageError, match="ignores range requests"):
        remote.read("a.tar", 0, 10)


def test_threads_share_a_client_and_processes_do_not(remote):
    with ThreadPoolExecutor(16) as threads:
        clients = set(threads.map(lambda _: id(s3_module._client()), range(64)))
        blocks = list(threads.map(lambda offset: remote.read("a.tar", offset, 7), range(64)))
    assert len(clients) == 1
    assert blocks == [CONTENT[offset : offset + 7] for offset in range(64)]
    assert pickle.loads(pickle.dumps(remote)).read("a.tar", 1, 5) == CONTENT[1:6]
    own = id(s3_module._client())
    child = os.fork()
    if child == 0:
        same = id(s3_module._client()) == own
        good = remote.read("a.tar", 3, 4) == CONTENT[3:7]
        os._exit(0 if good and not same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_full_disk_while_copying(remote, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        remote.fetch("a.tar", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.tar"]
