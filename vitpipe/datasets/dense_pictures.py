"""The pictures of prepared dense sets (COCO, ADE20K, DAVIS) without their annotations, for pre-training.

A packed set is read from its archive, in the prepared folder or in object storage, without being unpacked:
one pass over the archive verifies it and notes place and checksum of every picture. A set in the user's
folder is read in place. The order is that of the names.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import write_whole, written_aside
from vitpipe.contracts.units import format_bytes
from vitpipe.data.decode import rgb_image
from vitpipe.data.manifest import (
    DenseManifest,
    SetManifest,
    Shard,
    ShardManifest,
    SplitManifest,
    read_manifest,
)
from vitpipe.data.shards import HEADER_BYTES, INDEX_DTYPE, ShardSet, is_header, member_name
from vitpipe.data.storage.storage import Storage, blocks_of
from vitpipe.datasets.dense_folder import REDO, checked_layout, kind_of, require_checksum, whole_archive
from vitpipe.datasets.layouts import layout_of
from vitpipe.datasets.layouts.file_tree import FileTree, Pictures
from vitpipe.datasets.tar_headers import walk_tar

SPLITS = ("train", "val")
_CHUNK = 2**20  # bytes per read
_REPLACE = "put an undamaged copy of it into the raw set, and run the prepare stage again"


class ArchivePictures(ShardSet):
    """The pictures of one split in the archive of a packed dense set, each with label 0; see `ShardSet`.

    Attributes:
        classes: none.
    """

    _unusable = "The archive cannot be used"
    _undecodable_fix = _REPLACE

    def _key(self, block: bytes) -> str:
        # The file as the set has it; a shard's members have names of the packer.
        return member_name(block)

    def _shown(self, position: int, block: bytes) -> str:
        known = is_header(block[:HEADER_BYTES])
        return f"the image '{member_name(block)}'" if known else super()._shown(position, block)


class FolderPictures:
    """The pictures of one split in the user's folder, each with label 0, as an `ImageSet`.

    Attributes:
        classes: none.
        names: of the files, relative to the set.
    """

    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __init__(self, tree: FileTree, names: Sequence[str]) -> None:
        self.tree, self.names = tree, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> NDArray[np.uint32]:
        """Zeros, (num_images,)."""
        return np.zeros(len(self.names), np.uint32)

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Pictures (RGB) with label 0 in the order of `positions`.

        Raises:
            DatasetError: when one cannot be read or decoded; the message names it.
        """
        for name in (self.names[position] for position in positions):
            yield rgb_image(self.tree.read(name), name, self.tree.where(name), _REPLACE), 0


AnyPictures = ArchivePictures | FolderPictures


def open_pictures(
    prepare_folder: Path, dataset: str, scratch: Path, say: Callable[[str], None]
) -> dict[str, AnyPictures]:
    """The pictures of the splits `train` and `val` of a prepared dense set.

    Args:
        scratch: keeps the list of an archive's pictures, once per content; may be shared by runs and ranks.
        say: told when a whole archive is read.

    Raises:
        DatasetError: when the set was not prepared or has changed since, or its layout does not say which
            files are pictures.
        StorageError: when a disk refuses a write, or a remote storage does not respond.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, SetManifest).root
    assert isinstance(manifest, DenseManifest), f"{dataset} is packed in shards"
    pictures_of = layout_of(kind_of(manifest)).pictures
    if pictures_of is None:
        raise DatasetError(
            f"The pictures of '{dataset}' cannot be read without its annotations: its layout "
            f"'{kind_of(manifest)}' does not say which files they are",
            where=folder,
            fix="give `pictures` to LAYOUT of this layout, or name another dataset",
        )
    if manifest.archive is None:
        layout = checked_layout(manifest, folder)
        names = {split: pictures_of(layout.files, split, layout.tree.read) for split in SPLITS}
        _require_counts(names, manifest, layout.root)
        return {split: FolderPictures(layout.tree, names[split]) for split in SPLITS}
    storage = whole_archive(folder, manifest)
    # Named by content: another version of the set gets another list. 64 bits as in `open_dense`.
    listing = scratch / f"{dataset}-{manifest.digest[:16]}-pictures.json"
    listed = _listed(listing)
    if listed is None:
        place = storage.place(manifest.archive)
        say(f"{dataset}: reading {place} once ({format_bytes(manifest.size_bytes)}) to verify and list it")
        listed = _list_archive(storage, manifest, pictures_of, listing)
    # The archive may have moved since it was listed.
    moved = listed.model_copy(update={"store": manifest.store})
    return {
        split: ArchivePictures(folder, moved, split, index=scratch / found.index)
        for split, found in moved.splits.items()
    }


def _listed(listing: Path) -> ShardManifest | None:
    """What an earlier pass over the archive has found; None where that is missing or damaged."""
    try:
        found = ShardManifest.model_validate_json(listing.read_bytes())
        splits = found.splits.values()
        intact = all(file_digest(listing.parent / split.index) == split.index_sha256 for split in splits)
    except (OSError, ValidationError):
        return None
    return found if intact else None


def _list_archive(
    storage: Storage, manifest: DenseManifest, pictures_of: Pictures, listing: Path
) -> ShardManifest:
    """Read an archive once: verify it, write an index per split, and last a manifest as of a shard set."""
    assert manifest.archive is not None
    archive = manifest.archive
    records = _verified_records(storage, manifest)

    def read(name: str) -> bytes:
        offset, size_bytes, _ = records[name]
        return storage.read(archive, offset, size_bytes)

    files = sorted(records)
    names = {split: pictures_of(files, split, read) for split in SPLITS}
    _require_counts(names, manifest, storage.place(archive))
    splits = {}
    with disk_errors(listing):
        listing.parent.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            # One shard, the archive, and one label.
            index = np.array([(*records[name], 0, 0) for name in names[split]], INDEX_DTYPE).tobytes()
            path = listing.with_name(f"{listing.stem}-{split}.index")
            # Several ranks write the same bytes; each replaces the file at once.
            with written_aside(path) as aside:
                aside.write_bytes(index)
            splits[split] = _split(path.name, index, len(names[split]), manifest)
        found = ShardManifest(dataset=manifest.dataset, classes=(), splits=splits, digest=manifest.digest)
        write_whole(listing, found.model_dump_json(indent=2) + "\n")
    return found


def _split(name: str, index: bytes, num_images: int, manifest: DenseManifest) -> SplitManifest:
    assert manifest.archive is not None
    assert manifest.archive_sha256 is not None
    shard = Shard(
        name=manifest.archive,
        num_images=num_images,
        size_bytes=manifest.size_bytes,
        sha256=manifest.archive_sha256,
    )
    return SplitManifest(
        num_images=num_images,
        images_per_class=(),
        index=name,
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=(shard,),
    )


def _verified_records(storage: Storage, manifest: DenseManifest) -> dict[str, tuple[int, int, int]]:
    """File -> offset, size in bytes and CRC-32 of its content, of an archive with the right checksum."""
    assert manifest.archive is not None
    source, records = _HashedTar(storage, manifest.archive, manifest.size_bytes), {}
    try:
        for member in walk_tar(source):
            left, crc32 = member.size_bytes, 0
            while left and (part := source.read(min(_CHUNK, left))):
                crc32, left = zlib.crc32(part, crc32), left - len(part)
            records[member.name] = member.offset, member.size_bytes, crc32
    except DatasetError:
        # Other bytes than those that were packed are the better explanation, and have another fix.
        require_checksum(source.sha256(), manifest, storage.place(manifest.archive))
        raise
    require_checksum(source.sha256(), manifest, storage.place(manifest.archive))
    return records


def _require_counts(names: Mapping[str, Sequence[str]], manifest: DenseManifest, where: str | Path) -> None:
    # Plans, and the shares of ranks, count with the manifest's numbers.
    for split, found in names.items():
        expected = manifest.counts[f"{split}_images"]
        if len(found) != expected:
            raise DatasetError(
                f"'{manifest.dataset}' has {len(found)} pictures of {split}, and {expected} by its manifest",
                where=where,
                fix=REDO,
            )


class _HashedTar:
    """An archive from front to back as a `TarBytes`, with the checksum of all its bytes."""

    def __init__(self, storage: Storage, name: str, size_bytes: int) -> None:
        self.path = Path(storage.place(name))
        self._blocks, self._size_bytes = blocks_of(storage, name, size_bytes), size_bytes
        self._digest, self._block, self._position = hashlib.sha256(), memoryview(b""), 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (len(self._block) or self._next_block()):
            part, self._block = self._block[:size], self._block[size:]
            parts.append(part)
            size -= len(part)
            self._position += len(part)
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass

    def reaches(self, position: int) -> bool:
        return position <= self._size_bytes

    def sha256(self) -> str:
        """Of the whole archive, whose rest is read."""
        while self._next_block():
            pass
        return self._digest.hexdigest()

    def _next_block(self) -> bool:
        self._block = memoryview(next(self._blocks, b""))
        self._digest.update(self._block)
        return len(self._block) > 0
