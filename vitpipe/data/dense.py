"""COCO, ADE20K and DAVIS keep their own layouts: packed as one tar per set, or left in the user's folder.

The embedded sets travel as one archive (a version control of data must not track folders of images)
and are unpacked once beside the training; a user's folder is used where it lies.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.data.manifest import DenseManifest, content_digest, read_manifest, write_manifest
from vitpipe.data.pack import tar_header
from vitpipe.data.verify import VERIFY_DENSE, DenseLayout
from vitpipe.errors import DatasetError, disk_errors

_BLOCK = 512
_COMPLETE = ".complete"
_AGAIN = "run the prepare stage again, or copy the prepared folder anew"


@dataclass(frozen=True)
class DenseFolder:
    """A dense set ready to read, in its own layout below `root`.

    Attributes:
        classes: category names in label order; for ADE20K label 0 (other) is not among them.
        counts: numbers of pictures and annotations, for example `train_images`.
    """

    root: Path
    classes: tuple[str, ...]
    digest: str
    counts: dict[str, int]


def pack_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a set as one tar with its layout inside, and its manifest; equal files give equal bytes.

    Raises:
        StorageError: when the disk refuses a write.
    """
    name = f"{layout.dataset}.tar"
    sha256, size = hashlib.sha256(), 0
    with disk_errors(out):
        out.mkdir(parents=True)
        with (out / name).open("wb") as archive:
            for member in layout.files:
                content = (layout.root / member).read_bytes()
                header = tar_header(member, len(content))
                for block in (header, content, bytes(-len(content) % _BLOCK)):
                    archive.write(block)
                    sha256.update(block)
                    size += len(block)
            end = bytes(2 * _BLOCK)
            archive.write(end)
            sha256.update(end)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            archive=name,
            archive_sha256=sha256.hexdigest(),
            size_bytes=size + len(end),
            digest="",
        )
        return _finish(manifest, out)


def point_dense(layout: DenseLayout, out: Path) -> DenseManifest:
    """Write a manifest that points at the user's folder.

    The digest covers names and sizes of all files, and the content of JSON and text files.
    """
    sizes = {name: (layout.root / name).stat().st_size for name in layout.files}
    texts = [name for name in layout.files if name.endswith((".json", ".txt"))]
    listing = {"sizes": sizes, "texts": {name: file_digest(layout.root / name) for name in texts}}
    with disk_errors(out):
        out.mkdir(parents=True)
        manifest = DenseManifest(
            dataset=layout.dataset,
            classes=layout.classes,
            counts=layout.counts,
            archive_sha256=digest_of(listing),
            size_bytes=sum(sizes.values()),
            root=layout.root.resolve(),
            digest="",
        )
        return _finish(manifest, out)


def open_dense(prepare_folder: Path, dataset: str, scratch: Path) -> DenseFolder:
    """Make a prepared dense set readable.

    Args:
        dataset: `coco`, `ade20k` or `davis`.
        scratch: where an archive is unpacked to, once per content; may be shared by runs and ranks.

    Raises:
        DatasetError: when the set was not prepared, its archive has changed, or the user's folder is gone
            or no longer what was verified.
        StorageError: when the disk refuses a write.
    """
    folder = prepare_folder / dataset
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is not None:
        root = scratch / f"{dataset}-{manifest.digest[:16]}"
        if not (root / _COMPLETE).is_file():
            _unpack(folder / manifest.archive, manifest, root)
    else:
        root = _checked_root(manifest, folder)
    return DenseFolder(root, manifest.classes, manifest.digest, manifest.counts)


def _finish(manifest: DenseManifest, out: Path) -> DenseManifest:
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    write_manifest(out, manifest)
    return manifest


def _unpack(archive: Path, manifest: DenseManifest, root: Path) -> None:
    """Unpack beside `root` and rename; the data filter refuses paths that lead outside, links and devices."""
    if not archive.is_file():
        raise DatasetError("The archive is missing", where=archive, mend=_AGAIN)
    if file_digest(archive) != manifest.archive_sha256:
        raise DatasetError("The archive's checksum is not that of the manifest", where=archive, mend=_AGAIN)
    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
            (partial / _COMPLETE).touch()
            partial.chmod(0o755)  # mkdtemp makes it private, but others may share the scratch folder
            partial.rename(root)
        except tarfile.TarError as error:
            raise DatasetError(f"The archive is refused ({error})", where=archive, mend=_AGAIN) from error
        except OSError:
            # Another rank or run may have been faster; its result is the same.
            if not (root / _COMPLETE).is_file():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _checked_root(manifest: DenseManifest, folder: Path) -> Path:
    root = manifest.root
    if root is None or not root.is_dir():
        raise DatasetError(
            f"The folder of '{manifest.dataset}' that was prepared is not there",
            where=root or folder,
            mend="mount it at the same place, or run the prepare stage again with the new data.root",
        )
    found = VERIFY_DENSE[manifest.dataset](root).counts
    if found != manifest.counts:
        raise DatasetError(
            f"The folder has changed since it was prepared: {found} instead of {manifest.counts}",
            where=root,
            mend="run the prepare stage again",
        )
    return root
