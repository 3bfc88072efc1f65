"""Writes one split as tar shards with an index, so that a kill at any moment costs at most one shard.

Each image is two members, `<key>.<extension>` and `<key>.cls` (the class number as text), which is what
WebDataset reads; our own reader uses the index beside the shards. Bytes depend on images, names and order
only: no times, no owners.

A shard has the suffix `.partial` until it is complete and on the disk; then a line in the journal says
how far the split is. Whoever starts again cuts everything back to the last such line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import BaseModel

from vitpipe.config.digest import file_digest
from vitpipe.data.manifest import Shard, SplitManifest

# Offset and size in bytes, CRC-32 of the image, number of the shard, class number; see shards.INDEX_DTYPE.
INDEX_RECORD = struct.Struct("<QIIII")
_LABEL_DTYPE = np.dtype([("other", "V20"), ("label", "<u4")])
_HASH_BYTES = 8
_BLOCK = 512
_PARTIAL = ".partial"


class ClosedShard(BaseModel):
    """One line of the journal: a shard is complete, and so is everything that belongs to it.

    Attributes:
        num_entries: images of the source that are dealt with, packed or left out, since the split began.
        listing: digest over those images' names, labels and stamps.
        findings_bytes: how long the list of findings was then.
    """

    shard: Shard | None
    num_entries: int
    listing: str
    findings_bytes: int


class PackJournal:
    """What is known to be complete of one split, in a file that survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[ClosedShard] = list(self._read())

    @property
    def last(self) -> ClosedShard:
        """The last complete state; all zero at the beginning."""
        return self.lines[-1] if self.lines else ClosedShard(
            shard=None, num_entries=0, listing="", findings_bytes=0
        )  # fmt: skip

    def write(self, line: ClosedShard) -> None:
        """Append a line; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(line.model_dump_json().encode() + b"\n")
            _to_disk(file)
        self.lines.append(line)

    def clear(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self.lines.clear()

    def _read(self) -> Iterator[ClosedShard]:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            # Cut off what a kill left of a line, so that the next one does not continue it.
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for text in whole.splitlines():
            yield ClosedShard.model_validate(json.loads(text))


class ShardWriter:
    """Appends images to one split. Made by `open_writer`, which also cuts back what a kill left."""

    def __init__(
        self, folder: Path, split: str, shards: list[Shard], index: BinaryIO, hashes: BinaryIO | None
    ) -> None:
        self.folder, self.split, self.shards = folder, split, shards
        self.index, self.hashes = index, hashes
        self.num_images = sum(shard.num_images for shard in shards)
        self.num_bytes = sum(shard.size_bytes for shard in shards)
        self._file: BinaryIO | None = None
        self._size = 0

    @property
    def open_bytes(self) -> int:
        """Size of the shard that is not yet closed."""
        return self._size

    def add(self, file_name: str, label: int, image: bytes, number: int = 0) -> None:
        """Append one image with its class number and, where they are kept, its perceptual hash."""
        if self._file is None:
            self._open_shard()
        stem, _, extension = file_name.rpartition(".")
        key = f"{self.num_images:09d}-{_safe(stem)[:60]}"
        offset = self._write_member(f"{key}.{_safe(extension).lower()[:8]}", image)
        self._write_member(f"{key}.cls", str(label).encode())
        self.index.write(INDEX_RECORD.pack(offset, len(image), zlib.crc32(image), len(self.shards), label))
        if self.hashes is not None:
            self.hashes.write(number.to_bytes(_HASH_BYTES, "little"))
        self.num_images += 1

    def close_shard(self) -> Shard | None:
        """End the open shard, if any; shard, index and hashes are on the disk when this returns."""
        for file in (self.index, self.hashes):
            if file is not None:
                _to_disk(file)
        if self._file is None:
            return None
        self._write(bytes(2 * _BLOCK))  # a tar file ends with two empty blocks
        _to_disk(self._file)
        self._file.close()
        partial = Path(self._file.name)
        partial.replace(partial.with_suffix(""))
        self._file = None
        shard = Shard(
            name=partial.stem,
            num_images=self.num_images - self._first_image,
            size_bytes=self._size,
            sha256=self._sha256.hexdigest(),
        )
        self.shards.append(shard)
        self.num_bytes, self._size = self.num_bytes + self._size, 0
        return shard

    def manifest(self, num_classes: int) -> SplitManifest:
        """The finished split; call it when the last shard is closed."""
        index = self.folder / f"{self.split}.index"
        labels = np.fromfile(index, _LABEL_DTYPE)["label"]
        return SplitManifest(
            num_images=self.num_images,
            images_per_class=tuple(np.bincount(labels, minlength=num_classes).tolist()),
            index=index.name,
            index_sha256=file_digest(index),
            hashes=None if self.hashes is None else f"{self.split}.hashes",
            shards=tuple(self.shards),
        )

    def abandon(self) -> None:
        """Close the files as they are; the disk may refuse even that, and the first error is told."""
        for file in (self._file, self.index, self.hashes):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _open_shard(self) -> None:
        name = f"{self.split}-{len(self.shards):06d}.tar{_PARTIAL}"
        self._file = (self.folder / name).open("wb")
        self._size, self._first_image, self._sha256 = 0, self.num_images, hashlib.sha256()

    def _write_member(self, name: str, content: bytes) -> int:
        """Append a tar member; returns the offset of its content."""
        self._write(tar_header(name, len(content)))
        offset = self._size
        self._write(content + bytes(-len(content) % _BLOCK))
        return offset

    def _write(self, block: bytes) -> None:
        assert self._file is not None
        self._file.write(block)
        self._sha256.update(block)
        self._size += len(block)


@contextmanager
def open_writer(folder: Path, split: str, journal: PackJournal, *, hashed: bool) -> Iterator[ShardWriter]:
    """A writer that goes on where the journal ends; everything after that is cut off first."""
    shards = [line.shard for line in journal.lines if line.shard is not None]
    num_images = sum(shard.num_images for shard in shards)
    complete = {shard.name for shard in shards}
    for path in folder.glob(f"{split}-*.tar*"):
        if path.name not in complete:
            path.unlink()
    index = open_cut(folder / f"{split}.index", num_images * INDEX_RECORD.size)
    hashes = open_cut(folder / f"{split}.hashes", num_images * _HASH_BYTES) if hashed else None
    writer = ShardWriter(folder, split, shards, index, hashes)
    try:
        yield writer
    finally:
        writer.abandon()


def is_whole(folder: Path, split: str, journal: PackJournal, *, hashed: bool) -> bool:
    """Do the files hold what the journal says? False when somebody has deleted or changed them."""
    shards = [line.shard for line in journal.lines if line.shard is not None]
    num_images = sum(shard.num_images for shard in shards)
    sizes = {shard.name: shard.size_bytes for shard in shards}
    least = {f"{split}.index": num_images * INDEX_RECORD.size}
    if hashed:
        least[f"{split}.hashes"] = num_images * _HASH_BYTES

    def size(name: str) -> int:
        path = folder / name
        return path.stat().st_size if path.is_file() else -1

    return all(size(name) == expected for name, expected in sizes.items()) and all(
        size(name) >= expected for name, expected in least.items() if expected
    )


def tar_header(name: str, size: int) -> bytes:
    """The ustar header of a plain file, 512 bytes, without time and owner: equal content, equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def open_cut(path: Path, size_bytes: int) -> BinaryIO:
    """Open a file for appending, cut back to a size first; made when it is not there.

    A finished set may hold the very file, as a link: then a copy is opened.
    """
    if path.exists() and path.stat().st_nlink > 1:
        copy = path.with_name(f"{path.name}{_PARTIAL}")
        shutil.copyfile(path, copy)
        copy.replace(path)
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size_bytes)
    file.seek(size_bytes)
    return file


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _safe(name: str) -> str:
    """Names for tar members: WebDataset takes everything after the first dot for the extension."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
