"""Tar and zip archives from strangers: listed, read and unpacked without trust in what they say.

Refused are names that lead out of a folder, links, devices, encrypted or duplicate members, and content that
inflates beyond all measure.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.datasets.tar_headers import Member, Names, damaged, plain_name, refused, walk_tar

# Images and annotations inflate by less than 30; deflate alone cannot go beyond 1,032.
MAX_RATIO = 200
# Below this size no ratio is looked at: a few megabytes of zeros harm nobody.
RATIO_FROM_BYTES = 64 * 2**20
# Members of compressed archives are held in memory; the largest annotation file has 0.5 GB.
MAX_MEMBER_BYTES = 4 * 2**30
_CHUNK = 2**20

__all__ = [
    "Member",
    "ZipEntry",
    "safe_tar_members",
    "safe_tar_stream",
    "safe_zip_members",
    "unpack_tar",
    "unpack_zip",
]


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file in a zip, as the archive's own directory lists it; `name` is the one to ask the zip for."""

    name: str
    size_bytes: int
    compressed_bytes: int
    crc32: int


def safe_tar_members(path: Path, *, offset: int = 0, size_bytes: int | None = None) -> Iterator[Member]:
    """List the files of an uncompressed tar by its headers; contents are skipped.

    Args:
        path: the file.
        offset: where the tar begins in it: a tar inside a tar is read in its place.
        size_bytes: length of the tar; to the end of the file if not given.

    Raises:
        DatasetError: when a member must not be trusted, or the archive is damaged, truncated or compressed.
    """
    with _damage(path), path.open("rb", buffering=0) as file:
        length = path.stat().st_size
        end = length if size_bytes is None else offset + size_bytes
        if end > length:
            raise damaged(path, f"it should reach to byte {end} and ends at {length}")
        yield from walk_tar(_Span(file, path, offset, end))


def safe_tar_stream(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read a tar, plain or compressed by gzip or bzip2, once from front to back: (name, content).

    Raises:
        DatasetError: as `safe_tar_members`, and for content that inflates beyond all measure.
    """
    with _inflating(path) as stream:
        for member in walk_tar(stream):
            if member.size_bytes > MAX_MEMBER_BYTES:
                raise refused(path, member.name, f"declares {member.size_bytes} bytes")
            yield member.name, b"".join(_content(stream, member))
        stream.finish()


def safe_zip_members(path: Path) -> Iterator[ZipEntry]:
    """List the files of a zip; all of them are checked before the first is given.

    Raises:
        DatasetError: when a member must not be trusted, or the archive is damaged or truncated.
    """
    with _open_zip(path) as archive:
        infos = _checked_infos(archive, path)
    for _, info in infos:
        yield ZipEntry(info.filename, info.file_size, info.compress_size, info.CRC)


def unpack_tar(archive: Path, folder: Path, *, limit_bytes: int) -> None:
    """Unpack into a new folder, which appears when everything is in it; empty folders are not made.

    When another process has made the folder meanwhile, that one stays.

    Args:
        archive: a tar, plain or compressed by gzip or bzip2.
        folder: does not exist yet.
        limit_bytes: of all contents together.

    Raises:
        DatasetError: as `safe_tar_stream`, and when there is more than `limit_bytes`.
        StorageError: when the disk refuses a write.
    """
    with _new_folder(folder) as partial, _inflating(archive) as stream:
        left = limit_bytes
        for member in walk_tar(stream):
            left = _take(left, member.size_bytes, archive, member.name, limit_bytes)
            _write(partial, member.name, _content(stream, member), archive)
        stream.finish()


def unpack_zip(archive: Path, folder: Path, *, limit_bytes: int) -> None:
    """Unpack into a new folder, which appears when everything is in it; as `unpack_tar`.

    Raises:
        DatasetError: as `safe_zip_members`, and when there is more than `limit_bytes`.
        StorageError: when the disk refuses a write.
    """
    with _new_folder(folder) as partial, _open_zip(archive) as opened:
        left = limit_bytes
        infos = _checked_infos(opened, archive)
        for name, info in infos:
            left = _take(left, info.file_size, archive, name, limit_bytes)
        for name, info in infos:
            with opened.open(info) as file:
                _write(partial, name, iter(lambda file=file: file.read(_CHUNK), b""), archive)  # type: ignore[misc]


class _Span:
    """A part of an uncompressed file."""

    def __init__(self, file: IO[bytes], path: Path, start: int, end: int) -> None:
        self.path, self._file, self._position, self._end = path, file, start, end

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self._file.seek(self._position)
        content = self._file.read(max(0, min(size, self._end - self._position)))
        self._position += len(content)
        return content

    def go_to(self, position: int) -> None:
        self._position = position

    def holds(self, position: int) -> bool:
        """Whether the span is that long."""
        return position <= self._end


class _Stream:
    """A file that is read once, inflated on the way and measured."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self.path, self._raw, self._count = path, raw, 0
        magic = raw.read(6)
        raw.seek(0)
        self._file: Any = raw
        if magic.startswith(b"\x1f\x8b"):
            self._file = gzip.GzipFile(fileobj=raw)
        elif magic.startswith(b"BZh"):
            self._file = bz2.BZ2File(raw)
        elif magic.startswith((b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise DatasetError(
                "The archive is compressed by xz or zstd, which is not read here",
                where=path,
                fix="unpack it and pack it again as a plain .tar",
            )

    def tell(self) -> int:
        return self._count

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._file.read(min(size, _CHUNK))):
            parts.append(part)
            size -= len(part)
            self._count += len(part)
            if self._count > RATIO_FROM_BYTES and self._count > MAX_RATIO * self._raw.tell():
                raise refused(self.path, "", f"inflates to more than {MAX_RATIO} times its size")
        return b"".join(parts)

    def go_to(self, position: int) -> None:
        while self._count < position and self.read(min(_CHUNK, position - self._count)):
            pass

    def holds(self, position: int) -> bool:
        """Unknown before it has been read."""
        return True

    def finish(self) -> None:
        """Read on to the end, where compressed files keep their checksum."""
        while self._file is not self._raw and self.read(_CHUNK):
            pass


def _content(stream: _Stream, member: Member) -> Iterator[bytes]:
    left = member.size_bytes
    while left:
        part = stream.read(min(_CHUNK, left))
        if not part:
            raise damaged(stream.path, f"it ends inside '{member.name}'")
        left -= len(part)
        yield part


def _checked_infos(archive: zipfile.ZipFile, path: Path) -> list[tuple[str, zipfile.ZipInfo]]:
    """Names and records of the files in a zip, after all checks, in the archive's order."""
    infos = archive.infolist()
    ends_before = archive.start_dir
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        # Members that share bytes let a small file list any amount of content.
        if info.header_offset < 0 or info.header_offset + 30 + info.compress_size > ends_before:
            raise refused(path, info.filename, "overlaps another member or the directory")
        ends_before = info.header_offset
    seen, files = Names(path), []
    for info in infos:
        name = plain_name(info.orig_filename, path)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.flag_bits & 1:
            raise refused(path, name, "is encrypted")
        if kind == stat.S_IFLNK:
            raise refused(path, name, "is a link")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refused(path, name, "is a device or pipe, not a file")
        if info.is_dir():
            continue
        if not name:
            raise refused(path, info.filename, "has no name")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refused(path, name, f"is compressed by method {info.compress_type}; 0 and 8 are read")
        if info.file_size > MAX_MEMBER_BYTES and info.compress_type != zipfile.ZIP_STORED:
            raise refused(path, name, f"declares {info.file_size} bytes")
        _no_bomb(info.file_size, info.compress_size, name, path)
        seen.add(name)
        files.append((name, info))
    _no_bomb(sum(info.file_size for _, info in files), sum(info.compress_size for _, info in files), "", path)
    return files


def _no_bomb(size: int, compressed: int, name: str, path: Path) -> None:
    if size > RATIO_FROM_BYTES and size > MAX_RATIO * compressed:
        raise refused(path, name, f"inflates to more than {MAX_RATIO} times its size")


def _take(left: int, size: int, path: Path, name: str, limit: int) -> int:
    if size > left:
        raise refused(path, name, f"brings the contents to more than {limit} bytes")
    return left - size


def _write(folder: Path, name: str, content: Iterator[bytes], archive: Path) -> None:
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for part in content:
                file.write(part)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise refused(archive, name, "is a file and a folder at once") from error


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A private folder beside the wanted one, renamed to it at the end."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private, but others may share the folder
            if not folder.exists():
                partial.rename(folder)
        except OSError:
            # Another process may have been faster; its result is the same.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _inflating(path: Path) -> Iterator[_Stream]:
    with _damage(path), path.open("rb") as raw:
        yield _Stream(raw, path)


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    with _damage(path), zipfile.ZipFile(path) as archive:
        yield archive


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what decompressors and file systems say about an archive into one kind of error.

    NotImplementedError is zipfile's word for a member that wants a later version of the format.
    """
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError) as error:
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from error
    except OSError as error:
        if error.errno is None:  # bz2 reports damage this way
            raise damaged(path, str(error)) from error
        own = error.filename is not None and Path(error.filename) == path
        if not own and error.errno != errno.EIO:
            raise  # of a file that was being written
        raise DatasetError(
            f"The archive cannot be read ({error.strerror})",
            where=path,
            fix="check its place and its rights",
        ) from error
