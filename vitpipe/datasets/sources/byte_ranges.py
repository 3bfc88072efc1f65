"""Where the bytes of one file of a source are: small values that travel to the processes that read them.

A place is made without reading the file. `stamp` changes when the file does, as far as that can be
told without reading it; it decides whether packing may go on after a kill.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image


class ByteRange(Protocol):
    """Anything that can be read once it is needed."""

    def read(self) -> bytes:
        """The whole content.

        Raises:
            OSError: when it cannot be read.
        """

    def stamp(self) -> str:
        """A short text that differs when the content may differ."""


@dataclass(frozen=True)
class FileSpan:
    """A file, or a part of one, such as a member of an uncompressed tar.

    Attributes:
        size_bytes: None for the whole file.
    """

    path: str
    offset: int = 0
    size_bytes: int | None = None

    def read(self) -> bytes:
        """The content, by one `pread` where the size is known."""
        if self.size_bytes is None:
            with open(self.path, "rb") as file:  # noqa: PTH123  # Path.read_bytes is twice as slow
                return file.read()
        file_number = _open_archive(self.path)
        content = os.pread(file_number, self.size_bytes, self.offset)
        if len(content) != self.size_bytes:
            raise OSError(f"{self.path} ends before byte {self.offset + self.size_bytes}")
        return content

    def stamp(self) -> str:
        """Size and time of change of the file; of a part, its place and those of the archive."""
        if self.size_bytes is not None:
            return f"{self.offset}+{self.size_bytes} of {_archive_stamp(self.path)}"
        return _stamp(self.path)


@dataclass(frozen=True)
class ZipMember:
    """A member of a zip archive; `crc32` is the one that the archive lists."""

    path: str
    name: str
    crc32: int

    def read(self) -> bytes:
        """The unpacked content, its checksum compared.

        Raises:
            OSError: when the member is damaged.
        """
        try:
            return _open_zip(self.path).read(self.name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(f"damaged in the archive ({error})") from error

    def stamp(self) -> str:
        """The listed checksum."""
        return f"{self.crc32:08x}"


@dataclass(frozen=True)
class Inline:
    """Content that had to be read already, for example out of a compressed tar or a parquet file."""

    content: bytes

    def read(self) -> bytes:
        """The content."""
        return self.content

    def stamp(self) -> str:
        """Its checksum."""
        return f"{zlib.crc32(self.content):08x}"


@dataclass(frozen=True)
class Pixels:
    """An RGB picture that a dataset keeps as numbers; (height, width, 3) uint8, row by row."""

    content: bytes
    height: int
    width: int

    def read(self) -> bytes:
        """The picture as PNG, without loss; the same numbers give the same bytes."""
        numbers = np.frombuffer(self.content, np.uint8).reshape(self.height, self.width, 3)
        buffer = io.BytesIO()
        Image.fromarray(numbers).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()

    def stamp(self) -> str:
        """Checksum of the numbers."""
        return f"{zlib.crc32(self.content):08x}"


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        return f"error {error.errno}"
    return f"{status.st_size}@{status.st_mtime_ns}"


# Millions of members share a few archives; while one is read nobody may change it anyway.
_archive_stamp = lru_cache(maxsize=256)(_stamp)


class _OpenFile:
    """Closes its file when the cache drops it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=64)
def _file(path: str, process: int) -> _OpenFile:
    return _OpenFile(path)


@lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _open_archive(path: str) -> int:
    return _file(path, os.getpid()).number


def _open_zip(path: str) -> zipfile.ZipFile:
    # A zip file has one read position: a process must not go on with the one of its parent.
    return _zip(path, os.getpid())
