"""COCO, ADE20K and DAVIS keep their own layouts: packed as one tar per set, or left in the user's folder.

Embedded sets and original archives travel as one tar (a version control of data must not track folders of
images) and are unpacked once beside the training; a user's folder may be used where it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import written_aside
from vitpipe.data.manifest import DenseManifest, content_digest, write_manifest
from vitpipe.datasets.layouts import DenseLayout
from vitpipe.prepare.shard_writer import tar_header

_BLOCK = 512


def pack_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a set as one tar with its layout inside, and its manifest; equal files give equal bytes.

    Files are copied piece by piece, out of archives too. The tar has another name until it is whole.

    Raises:
        DatasetError: when a file cannot be read, or changes meanwhile.
        StorageError: when the disk refuses a write.
    """
    name = f"{layout.dataset}.tar"
    sha256, size = hashlib.sha256(), 0
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # One name for all attempts: a killed one leaves at most one partial tar, which the next overwrites.
        with written_aside(out / name, out / f".{name}.partial") as partial, partial.open("wb") as archive:
            for block in _tar_blocks(layout):
                archive.write(block)
                sha256.update(block)
                size += len(block)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            archive=name,
            form=layout.form,
            archive_sha256=sha256.hexdigest(),
            size_bytes=size,
            digest="",
        )
        return _finish(manifest, out)


def point_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a manifest that points at the user's folder.

    The digest covers names and sizes of all files, and the content of JSON and text files.

    Raises:
        DatasetError: when the set, or a part of it, lies in its original archives.
        StorageError: when the disk refuses a write.
    """
    if not layout.is_folder:
        raise DatasetError(
            f"'{layout.dataset}' lies in {layout.form}, which cannot be used in their place",
            where=layout.root,
            fix="set data.keep_dense to pack or auto, or unpack the archives there",
        )
    sizes = {name: (layout.root / name).stat().st_size for name in layout.files}
    texts = [name for name in layout.files if name.endswith((".json", ".txt"))]
    listing = {"sizes": sizes, "texts": {name: file_digest(layout.root / name) for name in texts}}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            form=layout.form,
            archive_sha256=digest_of(listing),
            size_bytes=sum(sizes.values()),
            root=layout.root.resolve(),
            digest="",
        )
        return _finish(manifest, out)


def _finish(manifest: DenseManifest, out: Path) -> DenseManifest:
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    write_manifest(out, manifest)
    return manifest


def _tar_blocks(layout: DenseLayout) -> Iterator[bytes]:
    """The bytes of a tar with all files of a set."""
    for name in layout.files:
        size = layout.tree.size_bytes(name)
        yield tar_header(name, size)
        num_bytes = 0
        for chunk in layout.tree.chunks(name):
            num_bytes += len(chunk)
            yield chunk
        if num_bytes != size:
            raise DatasetError(
                f"A file has {num_bytes} bytes instead of {size}: it changed while it was being packed",
                where=layout.tree.where(name),
                fix="let nobody write to the set meanwhile, and run the prepare stage again",
            )
        yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)  # a tar file ends with two empty blocks
