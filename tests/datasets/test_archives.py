"""Archives made to do harm, one of each kind, and honest ones beside them."""

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
    unpack_zip,
)

HONEST = {"a/one.txt": b"one", "a/b/two.bin": bytes(range(256)) * 5, "empty": b"", "a/" + "n" * 130: b"long"}
LIMIT = 2**20


def tar_of(files, mode="w", format=tarfile.GNU_FORMAT) -> bytes:
    """A tar of names and contents; a TarInfo in the place of a name is taken as it is."""
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
def test_an_honest_tar(tmp_path, format):
    content = tar_of([(special(tarfile.DIRTYPE, "./a"), b""), *HONEST.items()], format=format)
    path = tmp_path / "honest.tar"
    path.write_bytes(content)
    members = {m.name: content[m.offset : m.offset + m.size_bytes] for m in safe_tar_members(path)}
    assert members == HONEST
    assert dict(safe_tar_stream(path)) == HONEST
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == HONEST
    assert sorted(p.name for p in tmp_path.iterdir()) == ["honest.tar", "out"]


def test_a_tar_inside_a_tar_is_read_in_its_place(tmp_path):
    path = tmp_path / "outer.tar"
    outer = tar_of({"n01.tar": tar_of(HONEST), "n02.tar": tar_of({"x": b"y"})})
    path.write_bytes(outer)
    found = {}
    for nested in safe_tar_members(path):
        inner = safe_tar_members(path, offset=nested.offset, size_bytes=nested.size_bytes)
        found[nested.name] = {m.name: outer[m.offset : m.offset + m.size_bytes] for m in inner}
    assert found == {"n01.tar": HONEST, "n02.tar": {"x": b"y"}}
    refuse("damaged", safe_tar_members, path, offset=512, size_bytes=10**9)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_an_honest_compressed_tar(tmp_path, compress):
    path = tmp_path / "honest.tgz"
    path.write_bytes(compress(tar_of(HONEST)))
    assert dict(safe_tar_stream(path)) == HONEST
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == HONEST
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


HOSTILE_TARS = {
    "parent": ([("../escaped", b"x")], "leads out"),
    "parent inside": ([("a/../../escaped", b"x")], "leads out"),
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
    "parent folder": ([(special(tarfile.DIRTYPE, "../outside"), b"")], "leads out"),
    "twice": ([("a/b", b"x"), ("./a//b", b"y")], "comes twice"),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["tar", "tgz"])
@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_hostile_tars_are_refused_and_leave_nothing(tmp_path, kind, compress):
    members, word = HOSTILE_TARS[kind]
    folder = tmp_path / "place"
    folder.mkdir()
    path = folder / "hostile.tar"
    path.write_bytes(compress(tar_of([("good", b"g"), *members])))
    if compress is bytes:
        refuse(word, safe_tar_members, path)
    refuse(word, safe_tar_stream, path)
    refuse(word, unpack_tar, path, folder / "out", limit_bytes=LIMIT)
    assert [p.name for p in tmp_path.rglob("*")] == ["place", "hostile.tar"]


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
def test_lying_pax_headers(tmp_path, headers, word):
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


def test_a_header_that_wants_all_memory(tmp_path):
    info = special(tarfile.GNUTYPE_LONGNAME, "././@LongLink")
    info.size = 2**40
    path = tmp_path / "name.tar"
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)))
    refuse("extended header", safe_tar_stream, path)


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1100, 1500, 2000])
def test_a_truncated_tar_is_no_shorter_tar(tmp_path, cut):
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
    packed[-6] ^= 1  # its checksum, which only a reader of the very end sees
    path.write_bytes(packed)
    refuse("damaged or truncated", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)
    assert not (tmp_path / "out").exists()


def test_compressed_tars_that_inflate_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FROM_BYTES", 2**20)
    bomb, tail = tmp_path / "bomb.tgz", tmp_path / "tail.tgz"
    bomb.write_bytes(gzip.compress(tar_of({"zeros": bytes(8 * 2**20)})))
    refuse("200 times its size", safe_tar_stream, bomb)
    refuse("200 times its size", unpack_tar, bomb, tmp_path / "out", limit_bytes=2**30)
    tail.write_bytes(gzip.compress(tar_of({"a": b"a"}) + bytes(8 * 2**20)))
    refuse("200 times its size", safe_tar_stream, tail)


def test_no_more_than_the_limit_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 500)
    path, zipped = tmp_path / "a.tar", tmp_path / "a.zip"
    files = {"a": b"a" * 400, "b": b"b" * 601}
    path.write_bytes(tar_of(files))
    zipped.write_bytes(zip_of(files, zipfile.ZIP_STORED))
    refuse("more than 1000 bytes", unpack_tar, path, tmp_path / "out", limit_bytes=1000)
    refuse("more than 1000 bytes", unpack_zip, zipped, tmp_path / "out", limit_bytes=1000)
    refuse("declares 601 bytes", safe_tar_stream, path)
    unpack_tar(path, tmp_path / "out", limit_bytes=1001)
    unpack_zip(zipped, tmp_path / "out2", limit_bytes=1001)
    assert contents(tmp_path / "out") == contents(tmp_path / "out2") == files


def test_a_member_that_is_file_and_folder(tmp_path):
    path = tmp_path / "both.tar"
    path.write_bytes(tar_of([("a", b"x"), ("a/b", b"y")]))
    refuse("file and a folder", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)
    path.write_bytes(tar_of([("a/b", b"x"), ("a", b"y")]))
    refuse("file and a folder", unpack_tar, path, tmp_path / "out", limit_bytes=LIMIT)


def test_a_folder_that_another_process_made_stays(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(HONEST))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").touch()
    unpack_tar(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == {"mark": b""}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "out"]


def test_what_is_no_archive(tmp_path):
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


def test_an_honest_zip(tmp_path):
    path = tmp_path / "honest.zip"
    path.write_bytes(zip_of([("a/", b""), *HONEST.items()]))
    entries = {entry.name: entry for entry in safe_zip_members(path)}
    assert {name: entry.size_bytes for name, entry in entries.items()} == {
        n: len(c) for n, c in HONEST.items()
    }
    assert entries["a/b/two.bin"].compressed_bytes < entries["a/b/two.bin"].size_bytes
    unpack_zip(path, tmp_path / "out", limit_bytes=LIMIT)
    assert contents(tmp_path / "out") == HONEST


def zip_entry(name="entry", mode=0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


HOSTILE_ZIPS = {
    "parent": ([("../escaped", b"x")], "leads out"),
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
    path = folder / "hostile.zip"
    path.write_bytes(content)
    refuse(word, safe_zip_members, path)
    refuse(word, unpack_zip, path, folder / "out", limit_bytes=LIMIT)
    assert [p.name for p in tmp_path.rglob("*")] == ["place", "hostile.zip"]


@pytest.mark.parametrize("kind", HOSTILE_ZIPS)
def test_hostile_zips_are_refused_and_leave_nothing(tmp_path, kind):
    members, word = HOSTILE_ZIPS[kind]
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


def test_zips_by_a_strange_method(tmp_path):
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
    whole = zip_of(HONEST)
    refuse_zip(tmp_path, whole[:-30], "damaged")
    path = tmp_path / "place" / "bad.zip"
    path.write_bytes(zip_of({"a": b"x" * 1000}, zipfile.ZIP_STORED).replace(b"xxxx", b"xyxx", 1))
    refuse("damaged", unpack_zip, path, tmp_path / "out", limit_bytes=LIMIT)
    assert not (tmp_path / "out").exists()


def test_a_zip_that_declares_less_than_it_holds(tmp_path):
    content = bytearray(zip_of({"a": b"x" * 1000}))
    directory = content.index(b"PK\1\2")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)
    path = tmp_path / "lie.zip"
    path.write_bytes(content)
    refuse("damaged", unpack_zip, path, tmp_path / "out", limit_bytes=100)
