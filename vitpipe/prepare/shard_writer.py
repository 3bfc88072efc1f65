"""Write one split as tar shards with an index; a kill at any moment loses at most one shard.

Each image is two members, `<key>.<extension>` and `<key>.cls` (the label as text), the format of WebDataset;
vitpipe's own reader uses the index next to the shards. The bytes depend on images, names and order only: tar
headers have no times and no owners.

A shard has the suffix `.partial` until it is complete and synced to the disk; then a line is appended to the
journal. A restart truncates all files to the state of the last line.
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

# Offset and size in bytes, CRC-32 of the image, number of the shard, label; see shards.INDEX_DTYPE. Packed
# little-endian, so that the reader maps the file as a NumPy array on any machine.
INDEX_RECORD = struct.Struct("<QIIII")
# The same record when only the label is needed: 20 bytes before it are skipped.
_LABEL_DTYPE = np.dtype([("other", "V20"), ("label", "<u4")])
_HASH_BYTES = 8
_BLOCK = 512  # a tar archive consists of blocks of 512 bytes (POSIX ustar)
_PARTIAL = ".partial"


class ClosedShard(BaseModel):
    """One line of the journal: a shard is complete, with its part of the index, hashes and findings.

    Attributes:
        shard: None if every image since the previous line was left out.
        num_entries: images of the source processed (packed or left out) since the start of the split.
        listing: digest over the names, labels and stamps (size, time) of those images.
        findings_bytes: size of the findings file at that point.
    """

    shard: Shard | None
    num_entries: int
    listing: str
    findings_bytes: int


class PackJournal:
    """Append-only record of the complete shards of one split."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[ClosedShard] = list(self._read())

    @property
    def last(self) -> ClosedShard:
        """The last complete state; all zero before the first shard."""
        return self.lines[-1] if self.lines else ClosedShard(
            shard=None, num_entries=0, listing="", findings_bytes=0
        )  # fmt: skip

    def write(self, line: ClosedShard) -> None:
        """Append a line and sync it to the disk."""
        with self.path.open("ab") as file:
            file.write(line.model_dump_json().encode() + b"\n")
            _to_disk(file)
        self.lines.append(line)

    def clear(self) -> None:
        """Delete the journal."""
        self.path.unlink(missing_ok=True)
        self.lines.clear()

    def _read(self) -> Iterator[ClosedShard]:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            # A kill can leave part of a line, which the next line must not be appended to.
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for text in whole.splitlines():
            yield ClosedShard.model_validate(json.loads(text))


class ShardWriter:
    """Appends images to one split. Created by `open_writer`, which truncates the files first."""

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
        """Size of the shard that is being written."""
        return self._size

    def add(self, file_name: str, label: int, image: bytes, number: int = 0) -> None:
        """Append one image with its label and, if hashes are stored, its perceptual hash."""
        if self._file is None:
            self._open_shard()
        stem, _, extension = file_name.rpartition(".")
        # A unique number, since names repeat across class folders; 10 + 60 + 9 characters stay below the
        # 100 of a ustar name.
        key = f"{self.num_images:09d}-{_safe(stem)[:60]}"
        offset = self._write_member(f"{key}.{_safe(extension).lower()[:8]}", image)
        self._write_member(f"{key}.cls", str(label).encode())
        self.index.write(INDEX_RECORD.pack(offset, len(image), zlib.crc32(image), len(self.shards), label))
        if self.hashes is not None:
            self.hashes.write(number.to_bytes(_HASH_BYTES, "little"))
        self.num_images += 1

    def close_shard(self) -> Shard | None:
        """Finish the current shard, if any, and sync shard, index and hashes to the disk."""
        for file in (self.index, self.hashes):
            if file is not None:
                _to_disk(file)
        if self._file is None:
            return None
        self._write(bytes(2 * _BLOCK))  # a tar archive ends with two zero blocks
        _to_disk(self._file)
        self._file.close()
        # Renamed after the sync: a file with the final name is always complete.
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
        """The manifest of the split; call it after the last shard is closed."""
        index = self.folder / f"{self.split}.index"
        # Read back, not counted while writing: a resumed run has not seen the images before the restart.
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
        """Close the files as they are, ignoring errors: closing flushes, which fails again on a full disk."""
        for file in (self._file, self.index, self.hashes):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _open_shard(self) -> None:
        name = f"{self.split}-{len(self.shards):06d}.tar{_PARTIAL}"
        self._file = (self.folder / name).open("wb")
        self._size, self._first_image, self._sha256 = 0, self.num_images, hashlib.sha256()

    def _write_member(self, name: str, content: bytes) -> int:
        """Append a tar member; returns the offset of its content in bytes."""
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
    """A writer that continues after the last line of the journal; anything newer is deleted or truncated."""
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
    """Whether shards, index and hashes have the sizes that follow from the journal."""
    shards = [line.shard for line in journal.lines if line.shard is not None]
    num_images = sum(shard.num_images for shard in shards)
    sizes = {shard.name: shard.size_bytes for shard in shards}
    # At least: index and hashes may also have records of the shard that a kill interrupted.
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
    """The ustar header (512 bytes) of a regular file; without time and owner, so it is reproducible."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def open_cut(path: Path, size_bytes: int) -> BinaryIO:
    """Open a file for appending, truncated to `size_bytes` first; created if missing."""
    # A finished prepared folder may have a hard link to this file (`pack._link`): truncating would change it
    # there too, so a copy is opened instead.
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
    """A name for a tar member: WebDataset takes everything after the first dot as the extension."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
