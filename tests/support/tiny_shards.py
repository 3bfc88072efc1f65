"""A packed dataset of a few small images, written according to the format without the packer."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.data.manifest import (
    DataManifest,
    Shard,
    ShardManifest,
    SplitManifest,
    content_digest,
    write_manifest,
)
from vitpipe.data.shards import files_of
from vitpipe.data.storage.open_storage import storage_of

NUM_CLASSES = 3


def picture(number: int, size: int = 24) -> bytes:
    """A JPEG file of uniform noise, reproducible from `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def send(folder: Path, manifest: ShardManifest) -> int:
    """Upload the shards and indexes of a dataset to the store in its manifest; returns the number of files."""
    storage = storage_of(folder, manifest.store)
    return sum(storage.put(folder / name, name, sha256) for name, sha256, _ in files_of(manifest))


def write_set(
    prepared: Path, *, num_images: int = 30, per_shard: int = 8, store: str | None = None, seed: int = 0
):
    """Write `prepared/imagenet` with splits train and val, and both manifests; returns that of the dataset."""
    folder = prepared / "imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, offset in (("train", 0), ("val", 500)):
        shards, index, images = [], b"", []
        for first in range(0, num_images, per_shard):
            numbers = range(first, min(first + per_shard, num_images))
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number in numbers:
                    image = picture(1000 * seed + offset + number)
                    member = tarfile.TarInfo(f"{number:09d}-noise.jpg")
                    member.size = len(image)
                    place = buffer.tell() + 512  # after the tar header
                    tar.addfile(member, io.BytesIO(image))
                    index += struct.pack(
                        "<QIIII", place, len(image), zlib.crc32(image), len(shards), number % NUM_CLASSES
                    )
                    images.append(image)
            name = f"{split}-{len(shards):06d}.tar"
            (folder / name).write_bytes(buffer.getvalue())
            sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
            shards.append(Shard(name=name, num_images=len(numbers), size_bytes=buffer.tell(), sha256=sha256))
        (folder / f"{split}.index").write_bytes(index)
        counts = tuple(len(range(label, num_images, NUM_CLASSES)) for label in range(NUM_CLASSES))
        splits[split] = SplitManifest(
            num_images=num_images, images_per_class=counts, index=f"{split}.index",
            index_sha256=file_digest(folder / f"{split}.index"), shards=tuple(shards),
        )  # fmt: skip
    manifest = ShardManifest(
        dataset="imagenet", classes=("n0", "n1", "n2"), splits=splits, store=store, digest=""
    )
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    write_manifest(folder, manifest)
    sets = {"imagenet": manifest.digest}
    write_manifest(prepared, DataManifest(source="folders", sets=sets, data_digest=digest_of(sets)))
    return manifest
