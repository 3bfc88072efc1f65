"""Untrusted archives: every kind of attack and damage is refused, valid archives are read completely."""

import bz2
import gzip
import io
import struct
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets import archives
from vitpipe.datasets.archives import (
    safe_tar_members,
    safe_tar_stream,
    safe_zip_members,
    unpack_tar,
)
from vitpipe.datasets.sources.byte_ranges import ZipMember

VALID = {"a/one.txt": b"one", "a/b/two.bin": bytes(range(256)) * 5, "empty": b"", "a/" + "n" * 130: b"long"}
LIMIT = 2**20


def tar_of(files, mode="w", format=tarfile.GNU_FORMAT) -> bytes:
    """A tar of names and contents; a TarInfo instead of a name is used as it is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(kind, name="entry", link="") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(files, method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(word, check, *arguments, **options) -> DatasetError:
    with pytest.raises(DatasetError, match=word) as caught:
        list(check(*arguments, **options) or ())
    assert caught.value.fix
    assert caught.value.where
    return caught.value


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_valid_tar(tmp_path, format):
    content = tar_of([(special(tarfile.DIRTYPE, "./a"), b""), *VALID.items()], format=format)
    path = tmp_path / "valid.tar"
    path.write_bytes(content)
    members = {m.name: content[m.offset : m.offset + m.size_bytes] for m in safe_tar_members(path)}
    assert members == VALID
    assert dict(safe_tar_stream(path)) == VALID
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == VALID
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "valid.tar"]


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path):
    path = tmp_path / "outer.tar"
    outer = tar_of({"n01.tar": tar_of(VALID), "n02.tar": tar_of({"x": b"y"})})
    path.write_bytes(outer)
    found = {}
    for nested in safe_tar_members(path):
        inner = safe_tar_members(path, offset=nested.offset, size_bytes=nested.size_bytes)
        found[nested.name] = {m.name: outer[m.offset : m.offset + m.size_bytes] for m in inner}
    assert found == {"n01.tar": VALID, "n02.tar": {"x": b"y"}}
    refuse("damaged", safe_tar_members, path, offset=512, size_bytes=10**9)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_a_valid_compressed_tar(tmp_path, compress):
    path = tmp_path / "valid.tgz"
    path.write_bytes(compress(tar_of(VALID)))
    assert dict(safe_tar_stream(path)) == VALID
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == VALID
    refuse("damaged", safe_tar_members, path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.text("abcé.-_", min_size=1, max_size=120).filter(lambda name: name.strip(".")),
        st.binary(max_size=1100),
        max_size=5,
    ),
    pax=st.booleans(),
)
def test_every_plain_tar_comes_back(tmp_path, files, pax):
    content = tar_of(files, format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
    path = tmp_path / "any.tar"
    path.write_bytes(content)
    assert dict(safe_tar_stream(path)) == files
    assert {m.name: content[m.offset : m.offset + m.size_bytes] for m in safe_tar_members(path)} == files


MALICIOUS_TARS = {
    "parent": ([("../escaped", b"x")], "points outside"),
    "parent inside": ([("a/../../escaped", b"x")], "points outside"),
    "absolute": ([("/etc/escaped", b"x")], "absolute name"),
    "drive": ([("C:escaped", b"x")], "absolute name"),
    "backslash": ([("..\\escaped", b"x")], "backslash"),
    "control character": ([("a\x1b[2Jb", b"x")], "control character"),
    "not UTF-8": ([("a\udcffb", b"x")], "not UTF-8"),
    "too long": ([("n" * 300, b"x")], "too long"),
    "symbolic link": ([(special(tarfile.SYMTYPE, link="/etc/passwd"), b"")], "is a link"),
    "hard link": ([(special(tarfile.LNKTYPE, link="../outside"), b"")], "is a link"),
    "character device": ([(special(tarfile.CHRTYPE), b"")], "device"),
    "block device": ([(special(tarfile.BLKTYPE), b"")], "device"),
    "pipe": ([(special(tarfile.FIFOTYPE), b"")], "device or pipe"),
    "sparse": ([(special(tarfile.GNUTYPE_SPARSE), b"")], "not a file"),
    "parent folder": ([(special(tarfile.DIRTYPE, "../outside"), b"")], "points outside"),
    "twice": ([("a/b", b"x"), ("./a//b", b"y")], "comes twice"),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["tar", "tgz"])
@pytest.mark.parametrize("kind", MALICIOUS_TARS)
def test_malicious_tars_are_refused_and_leave_nothing(tmp_path, kind, compress):
    members, word = MALICIOUS_TARS[kind]
    folder = tmp_path / "place"
    folder.mkdir()
    path = folder / "malicious.tar"
    path.write_bytes(compress(tar_of([("good", b"g"), *members])))
    if compress is bytes:
        refuse(word, safe_tar_members, path)
    refuse(word, safe_tar_stream, path)
    refuse(word, unpack_tar, path, folder / "out", limit_bytes=LIMIT)
    assert [p.name for p in tmp_path.rglob("*")] == ["place", "malicious.tar"]


def test_a_name_with_nul_in_a_pax_header(tmp_path):
    info = tarfile.TarInfo("short")
    info.pax_headers = {"path": "good\0../evil"}
    path = tmp_path / "nul.tar"
    path.write_bytes(tar_of([(info, b"x")], format=tarfile.PAX_FORMAT))
    refuse("control character", safe_tar_members, path)


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({"GNU.sparse.major": "1", "GNU.sparse.name": "x"}, "sparse"),
        ({"size": "99999999999"}, "archive ends before"),
        ({"size": "-1"}, "archive ends before"),
        ({"size": "many"}, "not a size"),
    ],
)
def test_malicious_pax_headers(tmp_path, headers, word):
    info = tarfile.TarInfo("x" * 10)
    info.pax_headers = headers
    path = tmp_path / "pax.tar"
    path.write_bytes(tar_of([(info, b"")], format=tarfile.PAX_FORMAT))
    refuse(word, safe_tar_members, path)


def test_a_global_header_that_renames_everything(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil"}) as t:
        t.addfile(tarfile.TarInfo("a"), io.BytesIO())
    path = tmp_path / "global.tar"
    path.write_bytes(buffer.getvalue())
    refuse("renames all", safe_tar_members, path)


def test_an_extended_header_that_declares_terabytes(tmp_path):
    info = special(tarfile.GNUTYPE_LONGNAME, "././@LongLink")
    info.size = 2**40
    path = tmp_path / "name.tar"
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)))
    refuse("extended header", safe_tar_stream, path)


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1100, 1500, 2000])
def test_a_truncated_tar_is_not_read_as_a_shorter_one(tmp_path, cut):
    whole = tar_of({"one": b"1" * 600, "two": b"2"})
    path, packed = tmp_path / "cut.tar", tmp_path / "cut.tgz"
    path.write_bytes(whole[:cut])
    refuse("damaged or truncated", safe_tar_members, path)
    refuse("damaged or truncated", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)
    small = gzip.compress(whole)
    packed.write_bytes(small[: len(small) * cut // 2048])
    refuse("damaged or truncated", unpack_tar, packed, tmp_path / "out", limit_bytes=LIMIT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.tar", "cut.tgz"]


def test_damage_in_the_middle(tmp_path):
    whole = bytearray(tar_of({"one": b"1" * 600, "two": b"2"}))
    whole[1536 + 10] ^= 1  # the name in the second header
    path = tmp_path / "bad.tar"
    path.write_bytes(whole)
    refuse("no valid header at byte 1536", safe_tar_members, path)
    packed = bytearray(gzip.compress(tar_of({"one": b"1" * 600})))
    packed[-6] ^= 1  # in the CRC-32 at the end, which is reached only by reading beyond the last member
    path.write_bytes(packed)
    refuse("damaged or truncated", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)
    assert not (tmp_path / "out").exists()


def test_compressed_tar_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FROM_BYTES", 2**20)
    bomb, tail = tmp_path / "bomb.tgz", tmp_path / "tail.tgz"
    bomb.write_bytes(gzip.compress(tar_of({"zeros": bytes(8 * 2**20)})))
    refuse("200 times its size", safe_tar_stream, bomb)
    refuse("200 times its size", unpack_tar, bomb, tmp_path / "out", limit_bytes=2**30)
    tail.write_bytes(gzip.compress(tar_of({"a": b"a"}) + bytes(8 * 2**20)))
    refuse("200 times its size", safe_tar_stream, tail)


def test_no_more_than_the_limit_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 500)
    path = tmp_path / "a.tar"
    files = {"a": b"a" * 400, "b": b"b" * 601}
    path.write_bytes(tar_of(files))
    refuse("more than 1000 bytes", unpack_tar, path, tmp_path / "out", limit_bytes=1000)
    refuse("declares 601 bytes", safe_tar_stream, path)
    unpack_tar(path, tmp_path / "out", limit_bytes=1001)
    assert contents(tmp_path / "out") == files


def test_a_member_that_is_file_and_folder(tmp_path):
    path = tmp_path / "both.tar"
    path.write_bytes(tar_of([("a", b"x"), ("a/b", b"y")]))
    refuse("file and a folder", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)
    path.write_bytes(tar_of([("a/b", b"x"), ("a", b"y")]))
    refuse("file and a folder", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)


def test_a_folder_that_another_process_made_is_kept(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(VALID))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").touch()
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == {"mark": b""}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "out"]


def test_files_that_are_not_archives(tmp_path):
    path = tmp_path / "page.tar"
    refuse("cannot be read", safe_tar_members, path)
    refuse("cannot be read", safe_tar_stream, path)
    refuse("cannot be read", safe_zip_members, path)
    path.write_bytes(b"<html>not found</html>" * 100)
    refuse("damaged", safe_tar_members, path)
    refuse("damaged", safe_tar_stream, path)
    refuse("damaged", safe_zip_members, path)
    path.write_bytes(b"\xfd7zXZ\0" + bytes(100))
    refuse("xz", safe_tar_stream, path)


def test_a_valid_zip(tmp_path):
    path = tmp_path / "valid.zip"
    path.write_bytes(zip_of([("a/", b""), *VALID.items()]))
    entries = {entry.name: entry for entry in safe_zip_members(path)}
    assert {name: entry.size_bytes for name, entry in entries.items()} == {
        n: len(c) for n, c in VALID.items()
    }
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in entries} == VALID
        assert all(entry.crc32 == archive.getinfo(name).CRC for name, entry in entries.items())


def zip_entry(name="entry", mode=0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


MALICIOUS_ZIPS = {
    "parent": ([("../escaped", b"x")], "points outside"),
    "absolute": ([("/etc/escaped", b"x")], "absolute name"),
    "drive": ([("C:/escaped", b"x")], "absolute name"),
    "backslash": ([("..\\escaped", b"x")], "backslash"),
    "link": ([(zip_entry(mode=0o120777), b"/etc/passwd")], "is a link"),
    "device": ([(zip_entry(mode=0o020644), b"")], "device"),
    "pipe": ([(zip_entry(mode=0o010644), b"")], "device or pipe"),
}


def refuse_zip(tmp_path, content, word):
    folder = tmp_path / "place"
    folder.mkdir()
    path = folder / "malicious.zip"
    path.write_bytes(content)
    refuse(word, safe_zip_members, path)
    assert [p.name for p in tmp_path.rglob("*")] == ["place", "malicious.zip"]


@pytest.mark.parametrize("kind", MALICIOUS_ZIPS)
def test_malicious_zips_are_refused_and_leave_nothing(tmp_path, kind):
    members, word = MALICIOUS_ZIPS[kind]
    refuse_zip(tmp_path, zip_of([("good", b"g"), *members]), word)


def test_zip_names_that_come_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        content = zip_of([("a", b"x"), ("a", b"y")])
    refuse_zip(tmp_path, content, "comes twice")


def test_a_zip_name_with_nul(tmp_path):
    content = zip_of({"good.jpgX../../evil": b"x"}).replace(b"good.jpgX", b"good.jpg\0")
    refuse_zip(tmp_path, content, "control character")


def test_an_encrypted_zip(tmp_path):
    content = bytearray(zip_of({"a": b"secret"}))
    content[content.index(b"PK\1\2") + 8] |= 1
    refuse_zip(tmp_path, bytes(content), "encrypted")


def test_zips_by_an_unsupported_method(tmp_path):
    refuse_zip(tmp_path, zip_of({"a": b"x" * 100}, zipfile.ZIP_LZMA), "method 14")


def test_a_zip_that_asks_for_a_later_version_of_the_format(tmp_path):
    content = bytearray(zip_of({"a": b"x"}))
    content[content.index(b"PK\x01\x02") + 6] = 99  # of the directory's entry: version needed, tenths
    refuse_zip(tmp_path, bytes(content), "version 9.9")


def test_zip_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FROM_BYTES", 2**20)
    refuse_zip(tmp_path, zip_of({"zeros": bytes(4 * 2**20)}), "200 times its size")
    path = tmp_path / "place" / "many.zip"
    path.write_bytes(zip_of({f"zeros{number}": bytes(2**19) for number in range(4)}))
    refuse("refused: it inflates", safe_zip_members, path)


def test_zip_members_that_share_their_bytes(tmp_path):
    content = bytearray(zip_of({"a": b"x" * 5000, "b": b"y" * 5000}, zipfile.ZIP_STORED))
    second = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)
    content[second + 42 : second + 46] = struct.pack("<I", 0)
    refuse_zip(tmp_path, bytes(content), "overlaps")


def test_a_truncated_or_damaged_zip(tmp_path):
    whole = zip_of(VALID)
    refuse_zip(tmp_path, whole[:-30], "damaged")
    path = tmp_path / "place" / "bad.zip"
    path.write_bytes(zip_of({"a": b"x" * 1000}, zipfile.ZIP_STORED).replace(b"xxxx", b"xyxx", 1))
    (entry,) = safe_zip_members(path)  # damage of a content shows only when it is read
    with pytest.raises(OSError, match="damaged in the archive"):
        ZipMember(str(path), entry.name, entry.crc32).read()


def test_a_zip_that_declares_less_than_it_holds(tmp_path):
    content = bytearray(zip_of({"a": b"x" * 1000}))
    directory = content.index(b"PK\1\2")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)
    path = tmp_path / "size.zip"
    path.write_bytes(content)
    (entry,) = safe_zip_members(path)
    with pytest.raises(OSError, match="damaged in the archive"):
        ZipMember(str(path), entry.name, entry.crc32).read()
