"""The headers of a tar, walked one by one without trust in what they say.

`tarfile` takes an invalid header in the middle of an archive for its end and keeps a list of all members;
here damage is an error and memory does not grow but for the hashes of names.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vitpipe.contracts.errors import DatasetError

_MAX_NAME_BYTES = 64 * 2**10
_BLOCK = 512
_ZERO = bytes(_BLOCK)
_AGAIN = "download it again from its official address and compare its checksum"
_DISTRUST = "it is not the archive that was published: " + _AGAIN


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an uncompressed tar; `offset` is where its content begins in the archive file, in bytes."""

    name: str
    offset: int
    size_bytes: int


class TarBytes(Protocol):
    """Where a tar is read from."""

    path: Path

    def tell(self) -> int:
        """The position, in bytes."""

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""

    def go_to(self, position: int) -> None:
        """Go forward to a position."""

    def holds(self, position: int) -> bool:
        """Whether there are so many bytes, as far as is known."""


def walk_tar(source: TarBytes) -> Iterator[Member]:
    """The files of a tar. The caller may read a file's content from the source before it goes on.

    Raises:
        DatasetError: for a member that is no plain file or folder, a name that comes twice or leads out of
            the folder, and for damage.
    """
    seen = Names(source.path)
    changes: dict[str, str] = {}
    position = source.tell()
    while True:
        source.go_to(position)
        header = source.read(_BLOCK)
        if header == _ZERO:
            return
        if len(header) < _BLOCK:
            raise damaged(source.path, f"it ends at byte {source.tell()} without an end mark")
        content = position + _BLOCK
        ordinary = None if changes else _ordinary(header)
        if ordinary is not None:
            name, size = ordinary
        else:
            info = _parse(header, source, position)
            if info.type in _EXTENSIONS:
                changes |= _extension(source, info)
                position = content + -(-info.size // _BLOCK) * _BLOCK
                continue
            name, size = changes.get("path", info.name), _size_of(source, info, changes)
            name, changes = plain_name(name, source.path), {}
            _only_files(info, name, source.path)
            if info.isdir():
                position = content
                continue
        if size < 0 or not source.holds(content + size):
            raise damaged(source.path, f"'{name}' should have {size} bytes, but the archive ends before")
        position = content + -(-size // _BLOCK) * _BLOCK
        seen.add(name)
        yield Member(name, content, size)


_REGULAR = ord("0")
# Neither hidden nor special in any way; everything else is looked at more closely.
_PLAIN_NAME = re.compile(rb"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


def _ordinary(header: bytes) -> tuple[str, int] | None:
    """(name, size) of a plain file with a plain name; None leaves the header to the careful way.

    Archives of millions of images hold hardly anything else, and this takes a third of the time.
    """
    name, size = header[:100].rstrip(b"\0"), header[124:135]
    if header[156] != _REGULAR or header[345] or not size.isdigit() or header[135] not in (0, 32):
        return None
    checksum = header[148:156]
    stated = checksum.strip(b"\0 ")
    if not stated.isdigit() or not _PLAIN_NAME.fullmatch(name):
        return None
    try:
        if int(stated, 8) != sum(header) - sum(checksum) + 8 * 32:
            return None
        return name.decode("ascii"), int(size, 8)
    except ValueError:  # an 8 or 9 is no octal digit
        return None


def _parse(header: bytes, source: TarBytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise damaged(source.path, f"no valid header at byte {position} ({error})") from error


def _extension(source: TarBytes, info: tarfile.TarInfo) -> dict[str, str]:
    """What a header before a header says about the next member: its long name, its size."""
    if not 0 <= info.size <= _MAX_NAME_BYTES:
        raise refused(source.path, info.name, f"declares an extended header of {info.size} bytes")
    content = source.read(info.size)
    if len(content) != info.size:
        raise damaged(source.path, "it ends inside a header")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(content.removesuffix(b"\0"))}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}  # only links have one, and links are refused
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        number = int(length) if length.isdigit() and len(length) < 7 else 0
        record = rest[: max(0, number - len(length) - 1)]
        key, equals, value = record.partition(b"=")
        if not record.endswith(b"\n") or not equals:
            raise damaged(source.path, "an extended header is not of the form 'length key=value'")
        records[_text(key)] = _text(value[:-1])
        content = content[number:]
    if any(key.startswith("GNU.sparse") for key in records):
        raise refused(source.path, info.name, "is a sparse file")
    if info.type == tarfile.XHDTYPE:
        return {key: records[key] for key in ("path", "size") if key in records}
    if {"path", "size", "linkpath"} & set(records):
        raise refused(source.path, info.name, "renames all members")
    return {}


def _size_of(source: TarBytes, info: tarfile.TarInfo, changes: dict[str, str]) -> int:
    if info.isdir():
        return 0
    size = changes.get("size", str(info.size))
    if not re.fullmatch(r"-?[0-9]{1,18}", size):
        raise damaged(source.path, f"'{size[:40]}' is not a size")
    return int(size)


def _only_files(info: tarfile.TarInfo, name: str, path: Path) -> None:
    if info.isdir():
        return
    if info.issym() or info.islnk():
        raise refused(path, name, f"is a link to '{info.linkname}'")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        kind = "a device or pipe" if info.isdev() else f"of the kind {info.type!r}"
        raise refused(path, name, f"is {kind}, not a file")
    if not name:
        raise refused(path, info.name, "has no name")


class Names:
    """Finds a name that comes twice, by hashes: a million names need a tenth of a gigabyte."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, set[int]()

    def add(self, name: str) -> None:
        """Remember a name, or refuse it."""
        number = hash(name)
        if number in self._seen:
            raise refused(self._path, name, "comes twice")
        self._seen.add(number)


def plain_name(name: str, path: Path) -> str:
    """The name with single slashes and without `./`.

    Raises:
        DatasetError: when it leads out of the folder or is no name that every system takes.
    """
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise refused(path, ascii(name), "has a name that is not UTF-8") from error
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise refused(path, ascii(name), "has a control character in its name")
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        raise refused(path, name, "has an absolute name")
    if "\\" in name:
        raise refused(path, name, "has a backslash in its name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused(path, name, "leads out of the folder")
    if any(len(part.encode()) > 255 for part in parts):
        raise refused(path, name[:100], "has too long a name")
    return "/".join(parts)


def damaged(path: Path, reason: str) -> DatasetError:
    """The error for an archive that is not whole."""
    return DatasetError(f"The archive is damaged or truncated: {reason}", where=path, fix=_AGAIN)


def refused(path: Path, name: str, reason: str) -> DatasetError:
    """The error for an archive that must not be trusted; `name` is the member, or empty for the whole."""
    member = f"its member '{name[:200]}' " if name else "it "
    return DatasetError(f"The archive is refused: {member}{reason}", where=path, fix=_DISTRUST)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
