"""References to the bytes of one image: small picklable values, sent to the processes that read them.

A reference is made without reading the file. Its `stamp` changes when the file changes, as far as that is
visible without reading it; packing resumes after an interruption only if the stamps are the same.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image


class ByteRange(Protocol):
    """A reference to the bytes of one image."""

    def read(self) -> bytes:
        """Read the whole content.

        Raises:
            OSError: when it cannot be read.
        """

    def stamp(self) -> str:
        """A short text that changes when the content may have changed."""


@dataclass(frozen=True)
class FileSpan:
    """A file, or a part of one such as a member of an uncompressed tar.

    Attributes:
        offset: position of the first byte.
        size_bytes: length; None for the whole file.
    """

    path: str
    offset: int = 0
    size_bytes: int | None = None

    def read(self) -> bytes:
        """Read the content, by a single `pread` where the size is known.

        Raises:
            OSError: when it cannot be read, or the file is shorter.
        """
        if self.size_bytes is None:
            # Not blocking: a named pipe among the images would otherwise be waited for without end.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file", self.path)
                return file.read()
        # `pread` takes the offset as an argument: threads may share the descriptor, which has only one
        # position.
        descriptor = _open_archive(self.path)
        content = os.pread(descriptor, self.size_bytes, self.offset)
        if len(content) != self.size_bytes:
            raise OSError(f"{self.path} ends before byte {self.offset + self.size_bytes}")
        return content

    def stamp(self) -> str:
        """Size and modification time of the file; for a part, its byte range as well."""
        if self.size_bytes is not None:
            return f"{self.offset}+{self.size_bytes} of {_archive_stamp(self.path)}"
        return _stamp(self.path)


@dataclass(frozen=True)
class ZipMember:
    """A member of a zip archive; `crc32` as listed in the central directory."""

    path: str
    name: str
    crc32: int

    def read(self) -> bytes:
        """Read the decompressed content; `zipfile` compares its CRC-32.

        Raises:
            OSError: when the member is damaged.
        """
        try:
            return _open_zip(self.path).read(self.name)
        # RuntimeError: `zipfile` raises it for an encrypted member.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(f"damaged in the archive ({error})") from error

    def stamp(self) -> str:
        """The listed CRC-32."""
        return f"{self.crc32:08x}"


@dataclass(frozen=True)
class Inline:
    """Content that is in memory already, for example from a compressed tar or a parquet file."""

    content: bytes

    def read(self) -> bytes:
        """The content."""
        return self.content

    def stamp(self) -> str:
        """Its CRC-32."""
        return f"{zlib.crc32(self.content):08x}"


@dataclass(frozen=True)
class Pixels:
    """An RGB image that is released as an array: (height, width, 3) uint8, row-major."""

    content: bytes
    height: int
    width: int

    def read(self) -> bytes:
        """The image as PNG, which is lossless; equal pixels give equal bytes."""
        pixels = np.frombuffer(self.content, np.uint8).reshape(self.height, self.width, 3)
        buffer = io.BytesIO()
        # 6 is zlib's default, stated because digests of shards depend on these bytes.
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()

    def stamp(self) -> str:
        """CRC-32 of the pixels."""
        return f"{zlib.crc32(self.content):08x}"


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        # A missing file is reported by `read`, with its name; listing a set must not fail on it.
        return f"error {error.errno}"
    return f"{status.st_size}@{status.st_mtime_ns}"


# One `stat` per archive instead of one per member: ILSVRC2012_img_train.tar has 1.3 million. An archive
# must not change while it is packed in any case, because the listed offsets would be wrong.
_archive_stamp = lru_cache(maxsize=256)(_stamp)


class _OpenFile:
    """A descriptor that is closed when the cache evicts it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


# Bounded: ImageNet-22K has 21,841 tars, and the usual limit of open files is 1,024 per process.
@lru_cache(maxsize=64)
def _file(path: str, process: int) -> _OpenFile:
    return _OpenFile(path)


# Fewer: an open `ZipFile` holds its whole directory, for COCO's train2017.zip 118,287 records.
@lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _open_archive(path: str) -> int:
    # Keyed by process as in `_open_zip`, although `pread` alone would not need it.
    return _file(path, os.getpid()).descriptor


def _open_zip(path: str) -> zipfile.ZipFile:
    # A forked process shares the read position of an open file with its parent; `ZipFile` seeks and reads.
    return _zip(path, os.getpid())
