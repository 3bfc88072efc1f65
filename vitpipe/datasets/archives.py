"""List, read and unpack untrusted tar and zip archives.

Refused are names that point outside the target folder, links, devices, encrypted or duplicate members, and
decompression bombs.
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

from vitpipe.contracts.errors import DatasetError, disk_errors, reason_of
from vitpipe.datasets.tar_headers import Member, Names, damaged, plain_name, refused, walk_tar

# Images and annotations inflate by a factor below 30. The largest factor of deflate is 1,032 (zlib.net,
# "Technical Details"); that of bzip2 is far higher.
MAX_RATIO = 200
# The ratio is not checked below this size: a few megabytes of zeros do no harm.
RATIO_FROM_BYTES = 64 * 2**20
# Members of compressed archives are read into memory; the largest annotation file (COCO) has 0.5 GB.
MAX_MEMBER_BYTES = 4 * 2**30
# Bytes per read. Bounds the memory of unpacking, and how much a bomb inflates before the next check.
_CHUNK = 2**20
# Size of the fixed part of a zip member's local header (APPNOTE.TXT, section 4.3.7).
_ZIP_LOCAL_HEADER_BYTES = 30

__all__ = [
    "Member",
    "ZipEntry",
    "safe_tar_members",
    "safe_tar_stream",
    "safe_zip_members",
    "unpack_tar",
]


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file in a zip, as listed in the archive's central directory.

    Attributes:
        name: as `zipfile` has it, for `ZipFile.open`.
        size_bytes: uncompressed.
        crc32: of the uncompressed content.
    """

    name: str
    size_bytes: int
    crc32: int


def safe_tar_members(path: Path, *, offset: int = 0, size_bytes: int | None = None) -> Iterator[Member]:
    """List the files of an uncompressed tar from its headers; contents are skipped.

    Args:
        path: the file.
        offset: position of the tar in the file, in bytes, for a tar within a tar.
        size_bytes: length of the tar; up to the end of the file if not given.

    Raises:
        DatasetError: when a member is refused, or the archive is damaged, truncated or compressed.
    """
    # Unbuffered: between two headers there is an image of 100 kB, and a buffer would read bytes that are
    # skipped.
    with _damage(path), path.open("rb", buffering=0) as file:
        length = path.stat().st_size
        end = length if size_bytes is None else offset + size_bytes
        if end > length:
            raise damaged(path, f"it should extend to byte {end} and ends at {length}")
        yield from walk_tar(_Span(file, path, offset, end))


def safe_tar_stream(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read a tar, plain or compressed by gzip or bzip2, in one sequential pass.

    Yields:
        Name and content of every file, in the order of the archive.

    Raises:
        DatasetError: as `safe_tar_members`, and for a decompression bomb.
    """
    with _inflating(path) as stream:
        for member in walk_tar(stream):
            if member.size_bytes > MAX_MEMBER_BYTES:
                raise refused(path, member.name, f"declares {member.size_bytes} bytes")
            yield member.name, b"".join(_content(stream, member))
        stream.finish()


def safe_zip_members(path: Path) -> Iterator[ZipEntry]:
    """List the files of a zip; all members are checked before the first one is yielded.

    Raises:
        DatasetError: when a member is refused, or the archive is damaged or truncated.
    """
    with _damage(path), zipfile.ZipFile(path) as archive:
        infos = _checked_infos(archive, path)
    for info in infos:
        yield ZipEntry(info.filename, info.file_size, info.CRC)


def unpack_tar(archive: Path, folder: Path, *, limit_bytes: int) -> None:
    """Unpack into a new folder, which appears under its name only when it is complete.

    Empty folders are not created. A folder that another process has created in the meantime is kept.

    Args:
        archive: a tar, plain or compressed by gzip or bzip2.
        folder: does not exist yet.
        limit_bytes: of all contents together.

    Raises:
        DatasetError: as `safe_tar_stream`, and when the contents exceed `limit_bytes`.
        StorageError: when the disk refuses a write.
    """
    # Why not `tarfile.extractall(filter="data")`: at a damaged header in the middle of an archive it
    # stops without an error (`tarfile.TarFile.next`, Python 3.13), which leaves an incomplete folder; a
    # later member replaces an earlier one of the same name; links within the folder are created; there is
    # no limit of size. It is also slower, because it sets mode and time of every file: 15 s instead of 10
    # s for 20,000 files of 2 kB.
    with _new_folder(folder) as partial, _inflating(archive) as stream:
        left = limit_bytes
        for member in walk_tar(stream):
            # Before the write, so that the disk never holds more than the limit.
            if member.size_bytes > left:
                raise refused(archive, member.name, f"brings the contents to more than {limit_bytes} bytes")
            left -= member.size_bytes
            _write(partial, member.name, _content(stream, member), archive)
        stream.finish()


class _Span:
    """A byte range of an uncompressed file, as a `TarBytes`."""

    def __init__(self, file: IO[bytes], path: Path, start: int, end: int) -> None:
        self.path, self._file, self._position, self._end = path, file, start, end

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self._file.seek(self._position)
        content = self._file.read(max(0, min(size, self._end - self._position)))
        self._position += len(content)
        return content

    def skip_to(self, position: int) -> None:
        self._position = position

    def reaches(self, position: int) -> bool:
        """Whether the range extends to `position`."""
        return position <= self._end


class _Stream:
    """A file that is decompressed in one sequential pass, with a check of the ratio, as a `TarBytes`."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self.path, self._raw, self._count = path, raw, 0
        magic = raw.read(6)  # of xz, the longest of the four
        raw.seek(0)
        self._file: Any = raw
        if magic.startswith(b"\x1f\x8b"):
            self._file = gzip.GzipFile(fileobj=raw)
        elif magic.startswith(b"BZh"):
            self._file = bz2.BZ2File(raw)
        elif magic.startswith((b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise DatasetError(
                "The archive is compressed by xz or zstd, which is not supported",
                where=path,
                fix="decompress it to a plain .tar",
            )

    def tell(self) -> int:
        return self._count

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._file.read(min(size, _CHUNK))):
            parts.append(part)
            size -= len(part)
            self._count += len(part)
            # `raw.tell()` is ahead by the decompressor's read buffer, which the 64 MB above make irrelevant.
            if self._count > RATIO_FROM_BYTES and self._count > MAX_RATIO * self._raw.tell():
                raise refused(self.path, "", f"inflates to more than {MAX_RATIO} times its size")
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        while self._count < position and self.read(min(_CHUNK, position - self._count)):
            pass

    def reaches(self, position: int) -> bool:
        """Unknown before it has been read, hence always true; `_content` finds the end."""
        return True

    def finish(self) -> None:
        """Read to the end, where gzip and bzip2 keep the checksum that shows damage."""
        while self._file is not self._raw and self.read(_CHUNK):
            pass


def _content(stream: _Stream, member: Member) -> Iterator[bytes]:
    left = member.size_bytes
    while left:
        part = stream.read(min(_CHUNK, left))
        if not part:
            raise damaged(stream.path, f"it ends within '{member.name}'")
        left -= len(part)
        yield part


def _checked_infos(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """Directory records of the files in a zip, after all checks, in the order of the archive."""
    infos = archive.infolist()
    ends_before = archive.start_dir
    # Members that share bytes let a small file list any amount of content (D. Fifield, "A better zip bomb",
    # WOOT 2019). Walking backwards, each member must end before the start of the previously visited one.
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        end = info.header_offset + _ZIP_LOCAL_HEADER_BYTES + info.compress_size
        if info.header_offset < 0 or end > ends_before:
            raise refused(path, info.filename, "overlaps another member or the directory")
        ends_before = info.header_offset
    seen, files = Names(path), []
    for info in infos:
        # Not `filename`, which `zipfile` cuts off at the first NUL: "good.jpg\0../evil" would look harmless.
        name = plain_name(info.orig_filename, path)
        # The upper 16 bits are the Unix mode; 0 where the archive was written on another system.
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.flag_bits & 1:  # bit 0 of the general purpose flags: encrypted
            raise refused(path, name, "is encrypted")
        if kind == stat.S_IFLNK:
            raise refused(path, name, "is a link")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refused(path, name, "is a device or pipe, not a file")
        if info.is_dir():
            continue
        if not name:
            raise refused(path, info.filename, "has no name")
        # Zip tools write these two by default; the ratios of bzip2 and LZMA are far higher.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refused(
                path, name, f"is compressed by method {info.compress_type}; only 0 and 8 are supported"
            )
        # Stored members take as many bytes in the archive, so their size is no attack.
        if info.file_size > MAX_MEMBER_BYTES and info.compress_type != zipfile.ZIP_STORED:
            raise refused(path, name, f"declares {info.file_size} bytes")
        _check_ratio(info.file_size, info.compress_size, name, path)
        seen.add(name)
        files.append(info)
    # The total as well: many members, each just below the size from which a single one is checked.
    _check_ratio(sum(info.file_size for info in files), sum(info.compress_size for info in files), "", path)
    return files


def _check_ratio(size: int, compressed: int, name: str, path: Path) -> None:
    if size > RATIO_FROM_BYTES and size > MAX_RATIO * compressed:
        raise refused(path, name, f"inflates to more than {MAX_RATIO} times its size")


def _write(folder: Path, name: str, content: Iterator[bytes], archive: Path) -> None:
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x" never overwrites: where the file system ignores case, two names can mean one file.
        with target.open("xb") as file:
            for part in content:
                file.write(part)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise refused(archive, name, "is a file and a folder at once") from error


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A private folder beside the target folder, renamed to it when the block ends without an error."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same parent, hence on the same file system: the rename is atomic.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it 0700, but other users may share the folder
            if not folder.exists():
                partial.rename(folder)
        except OSError:
            # A rename onto a folder with content fails: another process was faster, with the same result.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _inflating(path: Path) -> Iterator[_Stream]:
    with _damage(path), path.open("rb") as raw:
        yield _Stream(raw, path)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn errors of decompressors and of the file system into a `DatasetError` that names the archive."""
    try:
        yield
    # `zipfile` raises NotImplementedError for a member that requires a later version of the format.
    except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError) as error:
        raise damaged(path, reason_of(error)) from error
    except OSError as error:
        if error.errno is None:  # `bz2` raises OSError("Invalid data stream") without a number
            raise damaged(path, str(error)) from error
        # Without this test a full disk while unpacking would be blamed on the archive. EIO has no file name
        # when a read of an open file fails.
        is_of_archive = error.filename is not None and Path(error.filename) == path
        if not is_of_archive and error.errno != errno.EIO:
            raise
        raise DatasetError(
            f"The archive cannot be read ({error.strerror})",
            where=path,
            fix="check its path and permissions",
        ) from error
