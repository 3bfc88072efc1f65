"""Random access to packed shards: position in, image bytes out. Needs no torch.

The index is memory-mapped and images are read with `os.pread`, so a set of any size opens at once,
and one `ShardSet` serves many loader processes.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.config.digest import file_digest
from vitpipe.data.manifest import ShardManifest, SplitManifest, read_manifest
from vitpipe.errors import DatasetError

INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("shard", "<u4"), ("label", "<u4")]
)
_HEADER = 512
# The usual limit of a process is 1,024 open files; the largest sets have several thousand shards.
_MAX_OPEN_SHARDS = 256
_MEND = "run the prepare stage again, or copy the prepared folder anew"


class Sample(NamedTuple):
    """One packed image: key (position and file name), class number, file bytes as they were packed."""

    key: str
    label: int
    image_bytes: bytes


class ShardSet:
    """One split of a packed classification set.

    Attributes:
        classes: class folder names in the order of the class numbers.
        class_names: names for people; empty when unknown.
        digest: digest of the whole dataset (all splits).
    """

    def __init__(self, folder: Path, manifest: ShardManifest, split: str) -> None:
        self.folder, self.dataset, self.split = folder, manifest.dataset, split
        self.classes, self.class_names, self.digest = manifest.classes, manifest.class_names, manifest.digest
        self.manifest: SplitManifest = manifest.splits[split]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._records = self._map_index()

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
        """
        offset, size, crc32, shard, label = self._records.item(position)
        block = os.pread(self._open(shard), _HEADER + size, offset - _HEADER)
        image = block[_HEADER:]
        if len(image) != size or zlib.crc32(image) != crc32:
            raise self._damaged(shard, f"image {position} has changed since it was packed")
        return Sample(block[:100].rstrip(b"\0").decode("ascii").rpartition(".")[0], label, image)

    def decode(self, position: int) -> tuple[Image.Image, int]:
        """The image at a position as RGB, with its class number.

        Raises:
            DatasetError: naming the image, when it cannot be read or decoded.
        """
        sample = self.read(position)
        try:
            with Image.open(io.BytesIO(sample.image_bytes)) as image:
                return image.convert("RGB"), sample.label
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(
                f"The image '{sample.key}' cannot be decoded ({error})",
                where=f"{self.folder}, split {self.split}, position {position}",
                mend="run the prepare stage again: it lists images like this one and leaves them out",
            ) from error

    def close(self) -> None:
        """Close the shard files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = self._map_index()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            try:
                file = os.open(self.folder / self.manifest.shards[shard].name, os.O_RDONLY)
            except OSError as error:
                raise self._damaged(shard, f"it cannot be opened ({error.strerror})") from error
            self._files[shard] = file
        return file

    def _map_index(self) -> NDArray[Any]:
        path = self.folder / self.manifest.index
        expected = self.manifest.num_images * INDEX_DTYPE.itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise DatasetError("The index is missing or incomplete", where=path, mend=_MEND)
        if expected == 0:
            return np.empty(0, INDEX_DTYPE)
        # A plain view: indexing numpy's memmap class is several times slower.
        return np.asarray(np.memmap(path, INDEX_DTYPE, mode="r"))

    def _damaged(self, shard: int, reason: str) -> DatasetError:
        where = self.folder / self.manifest.shards[shard].name
        return DatasetError(f"A shard cannot be used: {reason}", where=where, mend=_MEND)


def open_shards(prepare_folder: Path, dataset: str, split: str) -> ShardSet:
    """Open one split of a prepared classification set.

    Args:
        dataset: `imagenet` or `imagenet22k`.
        split: `train` or `val`.

    Raises:
        DatasetError: when the set was not prepared, or a shard is missing or has another size.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, ShardManifest)
    if split not in manifest.splits:
        raise DatasetError(f"'{dataset}' has no split '{split}'", where=folder, mend=_MEND)
    for shard in manifest.splits[split].shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size_bytes:
            problem = "is missing" if size is None else f"has {size} bytes instead of {shard.size_bytes}"
            raise DatasetError(f"A shard {problem}", where=path, mend=_MEND)
    return ShardSet(folder, manifest, split)


def verify_checksums(prepare_folder: Path, dataset: str) -> int:
    """Read every shard and index of a set and compare checksums; returns the number of bytes read.

    Raises:
        DatasetError: naming all files that differ.
    """
    folder = prepare_folder / dataset
    num_bytes, bad = 0, []
    for split in read_manifest(folder, ShardManifest).splits.values():
        files = [(shard.name, shard.sha256) for shard in split.shards]
        for name, sha256 in [*files, (split.index, split.index_sha256)]:
            path = folder / name
            if not path.is_file() or file_digest(path) != sha256:
                bad.append(name)
            else:
                num_bytes += path.stat().st_size
    if bad:
        raise DatasetError(f"Checksums differ: {', '.join(bad)}", where=folder, mend=_MEND)
    return num_bytes
