"""Random access to packed shards: position in, image bytes out. Needs no torch.

The index is memory-mapped, so a set of any size opens at once. Shards lie in the prepared folder or in
object storage; ranges of remote ones are kept in a cache on this machine. Whatever is read is compared
with the checksum in the index. One `ShardSet` serves many loader processes.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import ShardManifest, SplitManifest, read_manifest
from vitpipe.data.storage.cache import RangeCache, shard_cache
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.data.storage.storage import Storage, blocks_of

INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("shard", "<u4"), ("label", "<u4")]
)
_HEADER, _HEADER_SUM = 512, slice(148, 156)
_REMOTE_READERS = 16
_MEND = "run the prepare stage again, or copy the prepared folder anew"
_MEND_REMOTE = "run the prepare stage again: it sends what is missing or damaged"


class Sample(NamedTuple):
    """One packed image: key (position and file name), class number, file bytes as they were packed."""

    key: str
    label: int
    image_bytes: bytes


class _Entry(NamedTuple):
    """One record of the index: where an image lies, and its checksum."""

    offset: int
    size: int
    crc32: int
    shard: int
    label: int


class ShardSet:
    """One split of a packed classification set.

    Attributes:
        classes: class folder names in the order of the class numbers.
        class_names: names for people; empty when unknown.
        digest: digest of the whole dataset (all splits).
        storage: where the shards lie.
        cache: what keeps ranges of remote shards on this machine; None when they are local.

    Raises:
        DatasetError: when the index is missing, incomplete or damaged.
    """

    def __init__(self, folder: Path, manifest: ShardManifest, split: str) -> None:
        self.folder, self.dataset, self.split = folder, manifest.dataset, split
        self.classes, self.class_names, self.digest = manifest.classes, manifest.class_names, manifest.digest
        self.manifest: SplitManifest = manifest.splits[split]
        self.storage: Storage = storage_of(folder, manifest.store)
        self.cache: RangeCache | None = shard_cache() if self.storage.is_remote else None
        self._readers: tuple[int, ThreadPoolExecutor] | None = None
        self._records = self._map_index(check=True)

    def __len__(self) -> int:
        return self.manifest.num_images

    @property
    def labels(self) -> NDArray[np.uint32]:
        """Class numbers of all samples, (num_images,)."""
        return self._records["label"]

    def read(self, position: int) -> Sample:
        """Read one sample.

        Raises:
            DatasetError: when the bytes are not those that were packed.
            StorageError: when a remote storage does not answer or refuses.
        """
        return self.read_many((position,))[0]

    def read_many(self, positions: Sequence[int]) -> list[Sample]:
        """Read samples, in the order of `positions`; remote ones at the same time. Raises as `read`."""
        entries = [_Entry(*self._records.item(position)) for position in positions]
        blocks: dict[int, bytes] = {}
        if self.cache is not None:
            cached = ((place, self._from_cache(self.cache, entry)) for place, entry in enumerate(entries))
            blocks = {place: block for place, block in cached if block is not None}
        missing = [place for place in range(len(entries)) if place not in blocks]
        read = self._pool().map if self.storage.is_remote and len(missing) > 1 else map
        wanted = [positions[place] for place in missing], [entries[place] for place in missing]
        blocks.update(zip(missing, read(self._from_storage, *wanted), strict=True))
        return [_sample(blocks[place], entry.label) for place, entry in enumerate(entries)]

    def decode(self, position: int) -> tuple[Image.Image, int]:
        """The image at a position as RGB, with its class number.

        Raises:
            DatasetError: naming the image, when it cannot be read or decoded.
        """
        return next(self.decode_many((position,)))

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Images and class numbers in the order of `positions`; all are read before the first is decoded.

        Raises:
            DatasetError: as `decode`.
        """
        for position, sample in zip(positions, self.read_many(positions), strict=True):
            try:
                with Image.open(io.BytesIO(sample.image_bytes)) as image:
                    read_at_once(image, sample.image_bytes)
                    image.load()
                    rgb = image if image.mode == "RGB" else image.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise DatasetError(
                    f"The image '{sample.key}' cannot be decoded ({error})",
                    where=f"{self.folder}, split {self.split}, position {position}",
                    fix="run the prepare stage again: it lists images like this one and leaves them out",
                ) from error
            yield rgb, sample.label

    def close(self) -> None:
        """Close the shard files and end the threads; reading opens them again."""
        self.storage.close()
        if self._readers is not None and self._readers[0] == os.getpid():
            self._readers[1].shutdown(wait=False)
        self._readers = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None, "_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = self._map_index(check=False)

    def _from_cache(self, cache: RangeCache, entry: _Entry) -> bytes | None:
        key = self.manifest.shards[entry.shard].sha256
        block = cache.read(key, entry.offset - _HEADER, _HEADER + entry.size)
        return block if block is not None and _is_whole(block, entry) else None

    def _from_storage(self, position: int, entry: _Entry) -> bytes:
        shard = self.manifest.shards[entry.shard]
        start = entry.offset - _HEADER
        for _ in range(1 if self.cache is None else 2):  # on the way something may go wrong once
            block = self.storage.read(shard.name, start, _HEADER + entry.size)
            if _is_whole(block, entry):
                if self.cache is not None:
                    self.cache.write(shard.sha256, start, block)
                return block
        raise DatasetError(
            f"A shard cannot be used: image {position} has changed since it was packed",
            where=self.storage.place(shard.name),
            fix=_fix(self.storage),
        )

    def _pool(self) -> ThreadPoolExecutor:
        """The reading threads of this process; those of the process it was forked from are not here."""
        if self._readers is None or self._readers[0] != os.getpid():
            self._readers = os.getpid(), ThreadPoolExecutor(_REMOTE_READERS, "shards")
        return self._readers[1]

    def _map_index(self, *, check: bool) -> NDArray[Any]:
        """The records, (num_images,). `check` compares the checksum of a cached index, a second per GB."""
        size_bytes = self.manifest.num_images * INDEX_DTYPE.itemsize
        if size_bytes == 0:
            return np.empty(0, INDEX_DTYPE)
        if self.cache is not None:
            path = self.cache.index(self.manifest.index_sha256, size_bytes, self._index_blocks, check=check)
            if path is None:
                return self._index_in_memory()
        else:
            path = Path(self.storage.place(self.manifest.index))
            if not path.is_file() or path.stat().st_size != size_bytes:
                raise DatasetError("The index is missing or incomplete", where=path, fix=_MEND)
        # A plain view: indexing numpy's memmap class is several times slower.
        return np.asarray(np.memmap(path, INDEX_DTYPE, mode="r"))

    def _index_in_memory(self) -> NDArray[Any]:
        content = b"".join(self._index_blocks())
        if hashlib.sha256(content).hexdigest() != self.manifest.index_sha256:
            raise DatasetError(
                "The index has another checksum than its manifest says",
                where=self.storage.place(self.manifest.index),
                fix=_MEND_REMOTE,
            )
        return np.frombuffer(content, INDEX_DTYPE)

    def _index_blocks(self) -> Iterator[bytes]:
        return blocks_of(self.storage, self.manifest.index, self.manifest.num_images * INDEX_DTYPE.itemsize)


def open_shards(prepare_folder: Path, dataset: str, split: str) -> ShardSet:
    """Open one split of a prepared classification set; its shards may lie in object storage.

    Args:
        dataset: `imagenet`, `cifar10` or another set of images with classes.
        split: `train` or `val`.

    Raises:
        DatasetError: when the set was not prepared, or a shard is missing or has another size.
        StorageError: when a remote storage does not answer or refuses.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, ShardManifest)
    if split not in manifest.splits:
        raise DatasetError(f"'{dataset}' has no split '{split}'", where=folder, fix=_MEND)
    storage = storage_of(folder, manifest.store)
    sizes = storage.sizes()
    for shard in manifest.splits[split].shards:
        size = sizes.get(shard.name)
        if size != shard.size_bytes:
            problem = "is missing" if size is None else f"has {size} bytes instead of {shard.size_bytes}"
            raise DatasetError(f"A shard {problem}", where=storage.place(shard.name), fix=_fix(storage))
    return ShardSet(folder, manifest, split)


def read_at_once(image: Image.Image, content: bytes) -> None:
    """Let Pillow hand the whole file to the decoder: by its 64 kB blocks a JPEG takes a sixth longer."""
    if isinstance(image, ImageFile.ImageFile):
        image.decodermaxblock = max(image.decodermaxblock, len(content))


def verify_checksums(prepare_folder: Path, dataset: str) -> int:
    """Read every shard and index of a set and compare checksums; returns the number of bytes read.

    Raises:
        DatasetError: naming all files that differ.
        StorageError: when a remote storage does not answer or refuses.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, ShardManifest)
    storage = storage_of(folder, manifest.store)
    sizes = storage.sizes()
    num_bytes, bad = 0, []
    for name, sha256, size_bytes in files_of(manifest):
        total = hashlib.sha256()
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
    """Name, checksum and size in bytes of every shard and index."""
    for split in manifest.splits.values():
        for shard in split.shards:
            yield shard.name, shard.sha256, shard.size_bytes
        yield split.index, split.index_sha256, split.num_images * INDEX_DTYPE.itemsize


def _is_whole(block: bytes, entry: _Entry) -> bool:
    """Are these the header and the image that were packed? A tar header carries its own checksum."""
    if len(block) != _HEADER + entry.size:
        return False
    header = block[:_HEADER]
    try:
        noted = int(header[_HEADER_SUM].rstrip(b"\0 "), 8)
    except ValueError:  # a hole in the cache
        return False
    # Its own field counts as eight spaces.
    if noted != sum(header) - sum(header[_HEADER_SUM]) + 8 * ord(" "):
        return False
    return zlib.crc32(memoryview(block)[_HEADER:]) == entry.crc32


def _sample(block: bytes, label: int) -> Sample:
    return Sample(block[:100].rstrip(b"\0").decode("ascii").rpartition(".")[0], label, block[_HEADER:])


def _fix(storage: Storage) -> str:
    return _MEND_REMOTE if storage.is_remote else _MEND
