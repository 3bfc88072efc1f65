"""Class folders into tar shards that are read by position.

Each image is two members, `<key>.<extension>` and `<key>.cls` (the class number as text), which is what
WebDataset reads; our own reader uses the index beside the shards. Images are stored byte for byte.
Nothing is held in memory but one class folder's list of names and one image. Bytes depend on the
images and names only: no times, no owners.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from PIL import Image

from vitpipe.config.digest import file_digest
from vitpipe.data.manifest import (
    LeftOut,
    Shard,
    ShardManifest,
    SplitManifest,
    content_digest,
    write_manifest,
)
from vitpipe.data.verify import ClassFolders
from vitpipe.errors import DatasetError, disk_errors

# Offset and size in bytes, CRC-32 of the image, number of the shard, class number; see shards.INDEX_DTYPE.
INDEX_RECORD = struct.Struct("<QIIII")
_BLOCK = 512
_NAMED_IN_MESSAGE = 20


@dataclass
class Quarantine:
    """Images that cannot be decoded, over all sets and splits of one prepare run."""

    limit: int
    entries: list[tuple[str, LeftOut]] = field(default_factory=list)

    def add(self, dataset: str, split: str, file: str, reason: str) -> None:
        """Remember one image."""
        self.entries.append((dataset, LeftOut(split=split, file=file, reason=reason)))

    def of(self, dataset: str) -> tuple[LeftOut, ...]:
        """The images of one dataset."""
        return tuple(entry for name, entry in self.entries if name == dataset)

    def check(self, where: Path) -> None:
        """Refuse more of them than allowed.

        Raises:
            DatasetError: naming the files.
        """
        if len(self.entries) <= self.limit:
            return
        named = [f"{entry.file} ({entry.reason})" for _, entry in self.entries[:_NAMED_IN_MESSAGE]]
        more = len(self.entries) - len(named)
        raise DatasetError(
            f"{len(self.entries)} files cannot be decoded, {self.limit} are allowed: {', '.join(named)}"
            + (f" and {more} more" if more else ""),
            where=where,
            mend="replace these files by good copies, or set data.max_corrupt_images to at least "
            f"{len(self.entries)} to train without them",
        )


def pack(layout: ClassFolders, out: Path, *, shard_bytes: int, quarantine: Quarantine) -> ShardManifest:
    """Pack all splits of a classification set and write its manifest.

    Args:
        layout: the verified folders.
        out: the set's folder inside the prepared folder; made here.
        shard_bytes: a shard is closed when it has reached this size.

    Raises:
        DatasetError: when more images than allowed cannot be decoded.
        StorageError: when the disk refuses a write.
    """
    splits = {}
    with disk_errors(out):
        out.mkdir(parents=True)
        for split in layout.splits:
            with ShardWriter(out, split, shard_bytes, len(layout.classes)) as writer:
                for label, file in layout.files(split):
                    image = file.read_bytes() if file.is_file() else b""
                    problem = image_problem(image) if file.is_file() else "a folder, not an image"
                    if problem:
                        name = str(file.relative_to(layout.root))
                        quarantine.add(layout.dataset, split, name, problem)
                    else:
                        writer.add(file.name, label, image)
            splits[split] = writer.manifest()
        quarantine.check(layout.root)
        manifest = ShardManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            class_names=layout.class_names,
            splits=splits,
            left_out=quarantine.of(layout.dataset),
            notes=layout.notes,
            digest="",
        )
        manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
        write_manifest(out, manifest)
    return manifest


def image_problem(image: bytes) -> str:
    """Why an image file cannot be used; empty when it can.

    The whole file is decoded, so truncation is found; JPEGs at an eighth of their size, which
    reads the same bytes in half the time.
    """
    if not image:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as picture:
                picture.draft(None, (max(1, picture.width // 8), max(1, picture.height // 8)))
                picture.load()
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on bad bytes.
        return " ".join(str(error).split())[:120] or type(error).__name__
    return ""


class ShardWriter:
    """Writes one split: shards `<split>-000000.tar`, ..., and `<split>.index`. Use as a context manager."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, num_classes: int) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._shards: list[Shard] = []
        self._images_per_class = [0] * num_classes
        self._file: BinaryIO | None = None
        self._index_path = folder / f"{split}.index"

    def __enter__(self) -> ShardWriter:
        self._index = self._index_path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
            self._index.close()
            return
        # The disk may refuse even the flush of closing; the first error is the one to tell.
        for handle in (self._index, self._file):
            try:
                if handle is not None:
                    handle.close()
            except OSError:
                pass

    @property
    def num_images(self) -> int:
        """Images written so far."""
        return sum(self._images_per_class)

    def add(self, file_name: str, label: int, image: bytes) -> None:
        """Append one image with its class number."""
        if self._file is None:
            self._open_shard()
        stem, _, extension = file_name.rpartition(".")
        key = f"{self.num_images:09d}-{_safe(stem)[:60]}"
        offset = self._write_member(f"{key}.{_safe(extension).lower()[:8]}", image)
        self._write_member(f"{key}.cls", str(label).encode())
        record = (offset, len(image), zlib.crc32(image), len(self._shards), label)
        self._index.write(INDEX_RECORD.pack(*record))
        self._images_per_class[label] += 1
        if self._size >= self._shard_bytes:
            self._close_shard()

    def manifest(self) -> SplitManifest:
        """The finished split; call it after the `with` block."""
        return SplitManifest(
            num_images=self.num_images,
            images_per_class=tuple(self._images_per_class),
            index=self._index_path.name,
            index_sha256=file_digest(self._index_path),
            shards=tuple(self._shards),
        )

    def _open_shard(self) -> None:
        name = f"{self._split}-{len(self._shards):06d}.tar"
        self._file = (self._folder / name).open("wb")
        self._size, self._first_image, self._sha256 = 0, self.num_images, hashlib.sha256()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._write(bytes(2 * _BLOCK))  # a tar file ends with two empty blocks
        self._file.close()
        name = Path(self._file.name).name
        self._file = None
        self._shards.append(
            Shard(
                name=name,
                num_images=self.num_images - self._first_image,
                size_bytes=self._size,
                sha256=self._sha256.hexdigest(),
            )
        )

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


def tar_header(name: str, size: int) -> bytes:
    """The ustar header of a plain file, 512 bytes, without time and owner: equal content, equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _safe(name: str) -> str:
    """Names for tar members: WebDataset takes everything after the first dot for the extension."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
