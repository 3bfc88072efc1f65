"""Random access to packed shards: position -> image bytes. Needs no torch.

The index is memory-mapped. Shards are in the prepared folder or in object storage; byte ranges of remote
shards are cached on this machine. Every read is verified against the checksum in the index.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.class_selection import ClassSelection
from vitpipe.data.decode import rgb_image
from vitpipe.data.manifest import SetManifest, ShardManifest, SplitManifest, read_manifest
from vitpipe.data.storage.cache import RangeCache, shard_cache
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.data.storage.storage import Storage, blocks_of

# The index format, 24 bytes per image, little-endian: offset and size in bytes and CRC-32 of the image file,
# number of the shard, class number. `shard_writer.INDEX_RECORD` is the same record; a test compares them.
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("shard", "<u4"), ("label", "<u4")]
)
# A tar member's header is one block of 512 bytes directly before its content; bytes 148 to 155 hold the
# header's checksum in octal (POSIX ustar).
HEADER_BYTES, _HEADER_SUM = 512, slice(148, 156)
# Remote reads wait for the network: all 16 run at the same time, within s3._CONNECTIONS.
_REMOTE_READERS = 16
_REPACK = "run the prepare stage again, or copy the prepared folder again"
_CHANGED = "has changed since it was packed"
_UPLOAD_AGAIN = "run the prepare stage again: it sends missing and damaged files"


class Sample(NamedTuple):
    """One packed image: key (position and file name), class number, bytes of the file as packed."""

    key: str
    label: int
    image_bytes: bytes


class _Entry(NamedTuple):
    """One record of the index; see `INDEX_DTYPE`."""

    offset: int
    size: int
    crc32: int
    shard: int
    label: int


class ShardSet:
    """One split of a packed classification set. One instance serves many loader processes and threads.

    Args:
        folder: holds the manifest and, without `store`, the shards.
        split: `train` or `val`.
        view: manifest of some classes of this set, to see only these, with class numbers of their own.
        index: the file of the index, where it is not beside the shards.

    Attributes:
        classes: class folder names in the order of the class numbers.
        class_names: names for people; empty when unknown.
        digest: digest of the whole dataset (all splits).
        storage: of the shards.
        cache: of byte ranges of remote shards; `None` for local ones.

    Raises:
        DatasetError: when the index is missing, incomplete or damaged.
    """

    # Words of messages, which other files in tars may need otherwise.
    _unusable = "A shard cannot be used"
    _undecodable_fix = "run the prepare stage again: it lists such images and leaves them out"

    def __init__(
        self,
        folder: Path,
        manifest: ShardManifest,
        split: str,
        view: ShardManifest | None = None,
        *,
        index: Path | None = None,
    ) -> None:
        seen = view or manifest
        self.folder, self.dataset, self.split = folder, seen.dataset, split
        self.classes, self.class_names, self.digest = seen.classes, seen.class_names, seen.digest
        self.manifest: SplitManifest = manifest.splits[split]
        self.storage: Storage = storage_of(folder, manifest.store)
        self.cache: RangeCache | None = shard_cache() if self.storage.is_remote else None
        self._index = index
        self._readers: tuple[int, ThreadPoolExecutor] | None = None
        self._records = self._map_index(check=True)
        self._chosen: ClassSelection | None = None
        if view is not None:
            self._chosen = ClassSelection(self._records["label"], manifest.classes, view.classes)

    def __len__(self) -> int:
        return self.manifest.num_images if self._chosen is None else len(self._chosen)

    @property
    def labels(self) -> NDArray[np.uint32]:
        """Class numbers of all samples, (num_images,)."""
        labels: NDArray[np.uint32] = self._records["label"]
        return labels if self._chosen is None else self._chosen.labels(labels)

    def read(self, position: int) -> Sample:
        """Read one sample.

        Raises:
            DatasetError: when the bytes differ from those that were packed.
            StorageError: when a remote storage does not respond or denies access.
        """
        return self.read_many((position,))[0]

    def read_many(self, positions: Sequence[int]) -> list[Sample]:
        """Read samples in the order of `positions`, remote ones concurrently. Raises as `read`."""
        entries = self._entries(positions)
        blocks: dict[int, bytes] = {}
        if self.cache is not None:
            cached = ((place, self._from_cache(self.cache, entry)) for place, entry in enumerate(entries))
            blocks = {place: block for place, block in cached if block is not None}
        missing = [place for place in range(len(entries)) if place not in blocks]
        # Local reads come from the page cache or one disk: threads would cost more than they save.
        read = self._pool().map if self.storage.is_remote and len(missing) > 1 else map
        wanted = [positions[place] for place in missing], [entries[place] for place in missing]
        blocks.update(zip(missing, read(self._from_storage, *wanted), strict=True))
        return [
            Sample(self._key(blocks[place]), entry.label, blocks[place][HEADER_BYTES:])
            for place, entry in enumerate(entries)
        ]

    def decode(self, position: int) -> tuple[Image.Image, int]:
        """The image at a position as RGB, with its class number.

        Raises:
            DatasetError: when it cannot be read or decoded; the message names the image.
            StorageError: as `read`.
        """
        return next(self.decode_many((position,)))

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Images (RGB) and class numbers in the order of `positions`. Raises as `decode`."""
        # All are read before the first is decoded, so that remote reads of a batch overlap.
        for position, sample in zip(positions, self.read_many(positions), strict=True):
            where = f"{self.folder}, split {self.split}, position {position}"
            rgb = rgb_image(sample.image_bytes, sample.key, where, self._undecodable_fix)
            yield rgb, sample.label

    def close(self) -> None:
        """Close the shard files and end the reading threads; the next read opens them again."""
        self.storage.close()
        # Threads do not survive a fork: a pool of the parent process must not be shut down here.
        if self._readers is not None and self._readers[0] == os.getpid():
            self._readers[1].shutdown(wait=False)
        self._readers = None

    def __getstate__(self) -> dict[str, Any]:
        # Threads cannot be pickled, and the index (300 MB for 14 million images) is mapped anew.
        return {**self.__dict__, "_readers": None, "_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The process that opened the set has compared the checksum.
        self._records = self._map_index(check=False)

    def _entries(self, positions: Sequence[int]) -> list[_Entry]:
        # `item` gives Python integers; arithmetic of NumPy's uint32 would wrap around.
        if self._chosen is None:
            return [_Entry(*self._records.item(position)) for position in positions]
        found = [_Entry(*self._records.item(self._chosen.positions.item(position))) for position in positions]
        return [entry._replace(label=self._chosen.label(entry.label)) for entry in found]

    def _key(self, block: bytes) -> str:
        """The key of the image whose tar header a block begins with."""
        return member_name(block).rpartition(".")[0]

    def _shown(self, position: int, block: bytes) -> str:
        """What a message calls an image with these damaged bytes, of which the header may be damaged."""
        return f"image {position}"

    def _from_cache(self, cache: RangeCache, entry: _Entry) -> bytes | None:
        # Keyed by content, not by name: two sets with equal shards share them, and a repacked shard never
        # meets ranges of its former version.
        key = self.manifest.shards[entry.shard].sha256
        block = cache.read(key, entry.offset - HEADER_BYTES, HEADER_BYTES + entry.size)
        return block if block is not None and _is_intact(block, entry) else None

    def _from_storage(self, position: int, entry: _Entry) -> bytes:
        shard, block = self.manifest.shards[entry.shard], b""
        start = entry.offset - HEADER_BYTES
        # A remote read gets a second attempt: bytes may be damaged in transit. A local file would give the
        # same bytes again.
        for _ in range(1 if self.cache is None else 2):
            block = self.storage.read(shard.name, start, HEADER_BYTES + entry.size)
            if _is_intact(block, entry):
                if self.cache is not None:
                    self.cache.write(shard.sha256, start, block)
                return block
        # The record decides where the image is looked for: a damaged index looks like a changed shard.
        name, what = shard.name, f"{self._unusable}: {self._shown(position, block)} {_CHANGED}"
        if self._index_sha256() != self.manifest.index_sha256:
            name, what = self.manifest.index, f"The index of the shards {_CHANGED}"
        raise DatasetError(what, where=self.storage.place(name), fix=_fix(self.storage))

    def _index_sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self._index_blocks():
            digest.update(block)
        return digest.hexdigest()

    def _pool(self) -> ThreadPoolExecutor:
        """The reading threads of this process; those of a parent process do not exist after a fork."""
        if self._readers is None or self._readers[0] != os.getpid():
            self._readers = os.getpid(), ThreadPoolExecutor(_REMOTE_READERS, "shards")
        return self._readers[1]

    def _map_index(self, *, check: bool) -> NDArray[Any]:
        """The records, (num_images,) of `INDEX_DTYPE`.

        Args:
            check: verify the checksum of a cached index, a second per GB.
        """
        # Memory-mapped: 14 million images open in 0.05 s (`benchmark index`), and loader processes share
        # the pages.
        size_bytes = self.manifest.num_images * INDEX_DTYPE.itemsize
        if size_bytes == 0:
            return np.empty(0, INDEX_DTYPE)  # an empty file cannot be mapped
        if self.cache is not None and self._index is None:
            path = self.cache.index(self.manifest.index_sha256, size_bytes, self._index_blocks, check=check)
            if path is None:
                return self._index_in_memory()
        else:
            path = self._index or Path(self.storage.place(self.manifest.index))
            if not path.is_file() or path.stat().st_size != size_bytes:
                raise DatasetError("The index is missing or incomplete", where=path, fix=_REPACK)
        # A plain array on the same memory: indexing numpy's memmap class is several times slower.
        return np.asarray(np.memmap(path, INDEX_DTYPE, mode="r"))

    def _index_in_memory(self) -> NDArray[Any]:
        # Without a usable cache disk training goes on, at the cost of 24 bytes of memory per image.
        content = b"".join(self._index_blocks())
        if hashlib.sha256(content).hexdigest() != self.manifest.index_sha256:
            raise DatasetError(
                "The checksum of the index differs from the manifest",
                where=self.storage.place(self.manifest.index),
                fix=_UPLOAD_AGAIN,
            )
        return np.frombuffer(content, INDEX_DTYPE)

    def _index_blocks(self) -> Iterator[bytes]:
        if self._index is not None:
            return iter((self._index.read_bytes(),))
        return blocks_of(self.storage, self.manifest.index, self.manifest.num_images * INDEX_DTYPE.itemsize)


def open_shards(prepare_folder: Path, dataset: str, split: str) -> ShardSet:
    """Open one split of a prepared classification set, on disk or in object storage.

    Args:
        prepare_folder: output of the prepare stage.
        dataset: `imagenet`, `cifar10` or another set of images with classes, or some classes of one.
        split: `train` or `val`.

    Raises:
        DatasetError: when the set was not prepared, or a shard is missing or has the wrong size.
        StorageError: when a remote storage does not respond or denies access.
    """
    view, manifest = None, read_shard_manifest(prepare_folder, dataset)
    if manifest.view is not None:
        view, made_of = manifest, manifest.view
        manifest = read_shard_manifest(prepare_folder, made_of.dataset)
        if manifest.digest != made_of.digest:
            raise DatasetError(
                f"'{manifest.dataset}' has changed since its classes were listed as '{dataset}'",
                where=prepare_folder / dataset,
                fix=_REPACK,
            )
    folder = prepare_folder / manifest.dataset
    if split not in manifest.splits:
        raise DatasetError(f"'{dataset}' has no split '{split}'", where=folder, fix=_REPACK)
    storage = storage_of(folder, manifest.store)
    # Sizes only, from one listing: checksums of the largest set would take hours, and every image is
    # verified when it is read.
    sizes = storage.sizes()
    for shard in manifest.splits[split].shards:
        size = sizes.get(shard.name)
        if size != shard.size_bytes:
            problem = "is missing" if size is None else f"has {size} bytes instead of {shard.size_bytes}"
            raise DatasetError(f"A shard {problem}", where=storage.place(shard.name), fix=_fix(storage))
    return ShardSet(folder, manifest, split, view)


def read_shard_manifest(prepare_folder: Path, dataset: str) -> ShardManifest:
    """The manifest of a prepared set of images with classes.

    Raises:
        DatasetError: as `read_manifest`, or the set is of another kind.
    """
    manifest = read_manifest(prepare_folder / dataset, SetManifest).root
    if not isinstance(manifest, ShardManifest):
        raise DatasetError(
            f"'{dataset}' is not a set of images with classes: it is in the layout of "
            f"{manifest.layout or dataset}",
            where=prepare_folder / dataset,
            fix="name a set with classes as `dataset` of this stage; `vitpipe datasets` lists them",
        )
    return manifest


def verify_checksums(prepare_folder: Path, dataset: str) -> int:
    """Verify the checksums of every shard and index of a set by reading them completely; none for a view.

    Returns:
        Total size in bytes.

    Raises:
        DatasetError: when files differ; the message names all of them.
        StorageError: when a remote storage does not respond or denies access.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, ShardManifest)
    storage = storage_of(folder, manifest.store)
    sizes = storage.sizes()
    num_bytes, bad = 0, []
    for name, sha256, size_bytes in files_of(manifest):
        total = hashlib.sha256()
        # A file of the wrong size is not read: its checksum differs in any case.
        if sizes.get(name) == size_bytes:
            for block in blocks_of(storage, name, size_bytes):
                total.update(block)
        if total.hexdigest() != sha256:
            bad.append(name)
        num_bytes += size_bytes
    if bad:
        place = folder if manifest.store is None else manifest.store
        raise DatasetError(f"Checksums differ: {', '.join(bad)}", where=place, fix=_fix(storage))
    return num_bytes


def files_of(manifest: ShardManifest) -> Iterator[tuple[str, str, int]]:
    """Name, SHA-256 and size in bytes of every shard and index; a class view has none."""
    if manifest.view is not None:
        return
    for split in manifest.splits.values():
        for shard in split.shards:
            yield shard.name, shard.sha256, shard.size_bytes
        yield split.index, split.index_sha256, split.num_images * INDEX_DTYPE.itemsize


def _is_intact(block: bytes, entry: _Entry) -> bool:
    """Whether a block is the tar header and the image that were packed."""
    # Both are checked, because the key in the header names the image in messages, and the index has a
    # checksum of the image only.
    if len(block) != HEADER_BYTES + entry.size:
        return False
    return is_header(block[:HEADER_BYTES]) and zlib.crc32(memoryview(block)[HEADER_BYTES:]) == entry.crc32


def is_header(header: bytes) -> bool:
    """Whether 512 bytes are an undamaged tar header."""
    try:
        noted = int(header[_HEADER_SUM].rstrip(b"\0 "), 8)
    except ValueError:  # zeros, a hole of the sparse cache file
        return False
    # The sum of all bytes of the header, with the checksum field counted as eight spaces (POSIX ustar).
    return noted == sum(header) - sum(header[_HEADER_SUM]) + 8 * ord(" ")


def member_name(block: bytes) -> str:
    """The name in a tar header (POSIX ustar), whose first bytes a block has."""
    # Bytes 0 to 99; of a longer name they are its end, and the beginning is in bytes 345 to 499.
    name, prefix = (field.rstrip(b"\0").decode("utf-8", "replace") for field in (block[:100], block[345:500]))
    return f"{prefix}/{name}" if prefix else name


def _fix(storage: Storage) -> str:
    return _UPLOAD_AGAIN if storage.is_remote else _REPACK
