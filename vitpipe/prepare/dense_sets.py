"""COCO, ADE20K and DAVIS in their original layouts: one tar per set, or a reference to the user's folder.

Embedded sets and original archives are copied to one tar, which the training stage unpacks once; a folder can
be used in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import written_aside
from vitpipe.contracts.units import counted
from vitpipe.data.manifest import DenseManifest, content_digest, write_manifest
from vitpipe.datasets.layouts import DenseLayout
from vitpipe.prepare.shard_writer import tar_header

# A tar archive consists of blocks of 512 bytes (POSIX.1-2001, pax/ustar interchange format).
_BLOCK = 512


def pack_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a set as one tar that contains its layout, and its manifest; equal files give equal bytes.

    Files are copied in chunks, also from archives. The tar has a temporary name until it is complete.

    Raises:
        DatasetError: if a file cannot be read, or changes while it is copied.
        StorageError: if a write to the disk fails.
    """
    # One file because DVC tracks every file of a folder by itself: COCO alone has 123,287 images.
    name = f"{layout.dataset}.tar"
    sha256, size = hashlib.sha256(), 0
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # The same temporary name in every attempt: a kill leaves one partial tar, which the next overwrites.
        with written_aside(out / name, out / f".{name}.partial") as partial, partial.open("wb") as archive:
            for block in _tar_blocks(layout):
                archive.write(block)
                sha256.update(block)
                size += len(block)
        manifest = DenseManifest(
            dataset=layout.dataset,
            layout=layout.kind,
            classes=layout.classes,
            counts=layout.counts,
            archive=name,
            form=layout.form,
            notes=notes_of(layout),
            archive_sha256=sha256.hexdigest(),
            size_bytes=size,
            digest="",
        )
        return _finish(manifest, out)


def point_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a manifest that references the user's folder.

    The digest covers names and sizes of all files, and the content of JSON and text files.

    Raises:
        DatasetError: if the set, or a part of it, is in its original archives.
        StorageError: if a write to the disk fails.
    """
    if not layout.is_folder:
        raise DatasetError(
            f"'{layout.dataset}' is stored as {layout.form}, which cannot be used in place",
            where=layout.root,
            fix="set data.keep_dense to pack or auto, or unpack the archives in this folder",
        )
    # Annotations and split lists decide the labels and are small. Hashing the images would read all of them
    # (18 GB of COCO training images) in every run, only to state a digest.
    sizes = {name: (layout.root / name).stat().st_size for name in layout.files}
    texts = [name for name in layout.files if name.endswith((".json", ".txt"))]
    listing = {"sizes": sizes, "texts": {name: file_digest(layout.root / name) for name in texts}}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        manifest = DenseManifest(
            dataset=layout.dataset,
            layout=layout.kind,
            classes=layout.classes,
            counts=layout.counts,
            form=layout.form,
            notes=notes_of(layout),
            archive_sha256=digest_of(listing),
            size_bytes=sum(sizes.values()),
            root=layout.root.resolve(),
            digest="",
        )
        return _finish(manifest, out)


def notes_of(layout: DenseLayout) -> tuple[str, ...]:
    """What is said about a set: files that are not used, repairs of its annotations."""
    return (*layout.notes, *(remark.what for remark in layout.remarks))


def _finish(manifest: DenseManifest, out: Path) -> DenseManifest:
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    write_manifest(out, manifest)
    return manifest


def _tar_blocks(layout: DenseLayout) -> Iterator[bytes]:
    """The bytes of a tar archive with all files of a set, in chunks."""
    for name in layout.files:
        size = layout.tree.size_bytes(name)
        yield tar_header(name, size)
        num_bytes = 0
        for chunk in layout.tree.chunks(name):
            num_bytes += len(chunk)
            yield chunk
        if num_bytes != size:
            raise DatasetError(
                f"A file has {counted(num_bytes, 'byte')} instead of {size}: it changed while it was packed",
                where=layout.tree.where(name),
                fix="stop the process that writes to this folder, and run the prepare stage again",
            )
        yield bytes(-size % _BLOCK)  # members are padded to whole blocks
    yield bytes(2 * _BLOCK)  # a tar archive ends with two zero blocks
