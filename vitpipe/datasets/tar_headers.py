"""Iterate over the headers of an untrusted tar: POSIX ustar and pax, and GNU long names.

`tarfile` takes an invalid header in the middle of an archive for its end and keeps a list of all members.
Here damage is an error, and memory grows only by one hash per name.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vitpipe.contracts.errors import DatasetError

# Of an extended header. A path has at most 4,096 bytes on Linux (PATH_MAX); without a limit, one header could
# declare a name of terabytes.
_MAX_EXTENDED_BYTES = 64 * 2**10
_BLOCK = 512  # bytes; headers and contents are padded to a multiple of it
_ZERO = bytes(_BLOCK)
_DOWNLOAD = "download it again from its official address and compare its checksum"
_NOT_THE_ORIGINAL = "it is not the archive that was published: " + _DOWNLOAD


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar; `offset` is the position of its content in the (decompressed) archive, in bytes."""

    name: str
    offset: int
    size_bytes: int


class TarBytes(Protocol):
    """The bytes of a tar, read from front to back."""

    path: Path

    def tell(self) -> int:
        """The position, in bytes."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""

    def skip_to(self, position: int) -> None:
        """Move forward to a position, in bytes."""

    def reaches(self, position: int) -> bool:
        """Whether the tar extends to `position`; true if not known yet."""


def walk_tar(source: TarBytes) -> Iterator[Member]:
    """Yield the files of a tar. The caller may read a file's content from `source` before the next step.

    Raises:
        DatasetError: for a member that is neither a regular file nor a folder, a duplicate name, a name that
            points outside the folder, and for damage.
    """
    seen = Names(source.path)
    # What extended headers override in the next member: keys "path" and "size", as in pax.
    overrides: dict[str, str] = {}
    position = source.tell()
    while True:
        source.skip_to(position)
        header = source.read(_BLOCK)
        # POSIX ends a tar with two zero blocks; one is enough here, as it is for GNU tar (which warns).
        if header == _ZERO:
            return
        if len(header) < _BLOCK:
            raise damaged(source.path, f"it ends at byte {source.tell()} without an end-of-archive block")
        content = position + _BLOCK
        parsed = None if overrides else _parse_simple(header)
        if parsed is not None:
            name, size = parsed
        else:
            info = _parse(header, source, position)
            if info.type in _EXTENSIONS:
                overrides |= _read_extension(source, info)
                position = content + -(-info.size // _BLOCK) * _BLOCK
                continue
            name, size = overrides.get("path", info.name), _size_of(source, info, overrides)
            name, overrides = plain_name(name, source.path), {}
            _require_file(info, name, source.path)
            if info.isdir():
                position = content  # a folder has no content, whatever size its header declares
                continue
        # A negative size would move backwards.
        if size < 0 or not source.reaches(content + size):
            raise damaged(source.path, f"'{name}' should have {size} bytes, but the archive ends before")
        position = content + -(-size // _BLOCK) * _BLOCK
        seen.add(name)
        yield Member(name, content, size)


_REGULAR = ord("0")
# ASCII, relative, no hidden part, no "..": such names need none of the checks of `plain_name`.
_PLAIN_NAME = re.compile(rb"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# Headers that describe the next member: GNU long name and long link, pax for one and for all members.
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


def _parse_simple(header: bytes) -> tuple[str, int] | None:
    """(name, size in bytes) of a regular file with a simple name; None for any other header.

    Archives of millions of images hold hardly anything else. Measured with 20,000 members: 0.8 s, by
    `tarfile.TarInfo.frombuf` 2.8 s.
    """
    # ustar fields (POSIX.1-2017, pax, "ustar Interchange Format"): name 0-99, size 124-135, checksum
    # 148-155, type 156, prefix of the name from 345.
    name, size = header[:100].rstrip(b"\0"), header[124:135]
    # Eleven octal digits and NUL or blank: sizes from 8 GiB on are base-256 (GNU) and go to `frombuf`.
    if header[156] != _REGULAR or header[345] or not size.isdigit() or header[135] not in (0, 32):
        return None
    checksum = header[148:156]
    stated = checksum.strip(b"\0 ")
    if not stated.isdigit() or not _PLAIN_NAME.fullmatch(name):
        return None
    try:
        # The checksum is the sum of all bytes, with its own eight counted as blanks (32).
        if int(stated, 8) != sum(header) - sum(checksum) + 8 * 32:
            return None
        return name.decode("ascii"), int(size, 8)
    except ValueError:  # an 8 or 9 is no octal digit
        return None


def _parse(header: bytes, source: TarBytes, position: int) -> tarfile.TarInfo:
    try:
        # surrogateescape keeps bytes that are not UTF-8, so that `plain_name` can refuse them by name.
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise damaged(source.path, f"no valid header at byte {position} ({error})") from error


def _read_extension(source: TarBytes, info: tarfile.TarInfo) -> dict[str, str]:
    """What an extended header overrides in the next member: its path, its size."""
    if not 0 <= info.size <= _MAX_EXTENDED_BYTES:
        raise refused(source.path, info.name, f"declares an extended header of {info.size} bytes")
    content = source.read(info.size)
    if len(content) != info.size:
        raise damaged(source.path, "it ends within a header")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(content.removesuffix(b"\0"))}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}  # only links have one, and links are refused
    # Pax records are "length key=value\n"; the length counts the whole record, itself included.
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        # Seven digits exceed the limit of a header; `int` of a long text of digits takes quadratic time.
        record_bytes = int(length) if length.isdigit() and len(length) < 7 else 0
        record = rest[: max(0, record_bytes - len(length) - 1)]
        key, equals, value = record.partition(b"=")
        if not record.endswith(b"\n") or not equals:
            raise damaged(source.path, "an extended header is not of the form 'length key=value'")
        records[_text(key)] = _text(value[:-1])
        content = content[record_bytes:]
    # The content of a sparse file is not its bytes in the archive: an offset would point to the wrong data.
    if any(key.startswith("GNU.sparse") for key in records):
        raise refused(source.path, info.name, "is a sparse file")
    if info.type == tarfile.XHDTYPE:
        return {key: records[key] for key in ("path", "size") if key in records}
    # A global header: harmless ones (git archive stores its commit as a comment) are ignored.
    if {"path", "size", "linkpath"} & set(records):
        raise refused(source.path, info.name, "renames all members")
    return {}


def _size_of(source: TarBytes, info: tarfile.TarInfo, overrides: dict[str, str]) -> int:
    if info.isdir():
        return 0
    # Pax carries sizes as decimal text. 18 digits fit into 64 bits; a sign is left for `walk_tar` to report.
    size = overrides.get("size", str(info.size))
    if not re.fullmatch(r"-?[0-9]{1,18}", size):
        raise damaged(source.path, f"'{size[:40]}' is not a size")
    return int(size)


def _require_file(info: tarfile.TarInfo, name: str, path: Path) -> None:
    if info.isdir():
        return
    if info.issym() or info.islnk():
        raise refused(path, name, f"is a link to '{info.linkname}'")
    # AREGTYPE (NUL) is the regular file of tars before POSIX, CONTTYPE is read as a regular file.
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        kind = "a device or pipe" if info.isdev() else f"of the kind {info.type!r}"
        raise refused(path, name, f"is {kind}, not a file")
    if not name:
        raise refused(path, info.name, "has no name")


class Names:
    """Detects duplicate names by their hashes: a million names take about 0.1 GB.

    Args:
        path: the archive, for messages.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, set[int]()

    def add(self, name: str) -> None:
        """Remember a name.

        Raises:
            DatasetError: when it was there before.
        """
        # 64 bits, seeded per process (PYTHONHASHSEED), so that collisions cannot be crafted. For the 14
        # million names of ImageNet-22K the probability of one by chance is 5e-6 (n^2 / 2^65).
        number = hash(name)
        if number in self._seen:
            raise refused(self._path, name, "comes twice")
        self._seen.add(number)


def plain_name(name: str, path: Path) -> str:
    """The name with single slashes and without `./`.

    Raises:
        DatasetError: when it points outside the folder, or is not valid on every operating system.
    """
    # `isascii` first: `encode` raises only for the surrogates of bytes that are not UTF-8.
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise refused(path, ascii(name), "has a name that is not UTF-8") from error
    # NUL ends a name in C; escape sequences would reach the terminal through our own messages.
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise refused(path, ascii(name), "has a control character in its name")
    # `C:` is a drive on Windows: `C:name` leaves the folder although it has no slash.
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        raise refused(path, name, "has an absolute name")
    if "\\" in name:
        raise refused(path, name, "has a backslash in its name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused(path, name, "points outside the folder")
    # NAME_MAX of the usual file systems, in bytes.
    if any(len(part.encode()) > 255 for part in parts):
        raise refused(path, name[:100], "has too long a name")
    return "/".join(parts)


def damaged(path: Path, reason: str) -> DatasetError:
    """The error for an archive that is damaged or incomplete."""
    return DatasetError(f"The archive is damaged or truncated: {reason}", where=path, fix=_DOWNLOAD)


def refused(path: Path, name: str, reason: str) -> DatasetError:
    """The error for an archive that is unsafe to use; `name` is the member, or empty for the whole."""
    member = f"its member '{name[:200]}' " if name else "it "
    return DatasetError(f"The archive is refused: {member}{reason}", where=path, fix=_NOT_THE_ORIGINAL)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
