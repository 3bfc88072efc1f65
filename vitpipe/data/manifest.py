"""Manifests of a prepared folder: one `manifest.json` at the top, one per dataset.

    PREPARED/manifest.json              source, digest of each dataset, digest of the whole
    PREPARED/imagenet/manifest.json     classes in order, splits, shards with checksums
    PREPARED/imagenet/findings.csv      unusual images: kept, converted or left out
    PREPARED/coco/manifest.json         classes, counts; the archive, or the root of the user's folder

A digest covers the content of a set (checksums, class order, counts), never its location.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import MANIFEST as MANIFEST
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.files import write_whole

FINDINGS = "findings.csv"
# Written into every manifest. Not part of the digest: a new schema does not change the data.
SCHEMA_VERSION = 2
# Provenance and location. The same images must have the same digest whether they were packed from folders,
# from the original tars or from Kaggle's layout, and wherever their shards are stored.
_NOT_CONTENT = {"digest", "root", "notes", "schema_version", "form", "store", "listing", "findings"}


class _Frozen(BaseModel):
    # Unknown keys are refused: a manifest of a later version is an error, not half understood.
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One tar file with its size in bytes and its checksum (SHA-256, hexadecimal)."""

    name: str
    num_images: int
    size_bytes: int
    sha256: str


class SplitManifest(_Frozen):
    """One split of a shard set.

    Attributes:
        images_per_class: in the order of the class numbers.
        index: name of the file with one record per image (`shards.INDEX_DTYPE`).
        hashes: name of the file with one perceptual hash (uint64) per image, with `data.near_duplicates`.
    """

    num_images: int
    images_per_class: tuple[int, ...]
    index: str
    index_sha256: str
    hashes: str | None = None
    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        """Total size of the shards, without index and hashes."""
        return sum(shard.size_bytes for shard in self.shards)


class Encoding(_Frozen):
    """How images were reduced while packing (`data.short_side`), which changes pixels.

    Attributes:
        short_side: pixels; larger images are resized to it, smaller ones are kept.
        quality: of the JPEG, 1 to 100.
    """

    short_side: int
    resampling: Literal["bicubic"] = "bicubic"
    format: Literal["jpeg"] = "jpeg"
    quality: int


class ShardManifest(_Frozen):
    """A classification set in shards.

    Attributes:
        classes: class folder names (for ImageNet the WordNet ids) in the order of the class numbers.
        class_names: human-readable names in the same order; may be empty.
        encoding: `None` when every file is byte for byte the source's.
        form: what it was packed from, human-readable.
        findings: number of unusual images by kind; `findings.csv` beside the manifest lists them.
        store: where shards and index are, if not beside the manifest: s3://bucket/prefix, or a folder.
        listing: digest over names, labels and modification stamps of the source; if it is unchanged, the
            set is not packed again.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    splits: dict[str, SplitManifest]
    encoding: Encoding | None = None
    form: str = ""
    findings: dict[str, int] = {}  # pydantic copies mutable defaults
    store: str | None = None
    listing: str = ""
    notes: tuple[str, ...] = ()
    digest: str


class DenseManifest(_Frozen):
    """A dense set (COCO, ADE20K, DAVIS) in its own layout: packed into `archive`, or left in place at `root`.

    Attributes:
        counts: numbers of images, annotations or sequences by name, for example `train_images`.
        form: what it was prepared from, human-readable.
        archive: file name of the tar, beside the manifest or in `store`.
        store: s3://bucket/prefix, or a folder.
        size_bytes: of the archive or of the files at `root`.
        root: the user's folder, where nothing was packed.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    form: str = ""
    archive: str | None = None
    archive_sha256: str | None = None
    store: str | None = None
    size_bytes: int
    root: Path | None = None
    digest: str


class DataManifest(_Frozen):
    """The whole prepared folder.

    Attributes:
        sets: dataset name -> digest of its content.
        data_digest: digest over all sets.
        revisions: per set, the DVC revision it was pulled at or that of the raw data.
    """

    schema_version: int = SCHEMA_VERSION
    source: Literal["embedded", "folders", "pinned"]
    sets: dict[str, str]
    data_digest: str
    revisions: dict[str, dict[str, str]] = {}


AnyManifest = TypeVar("AnyManifest", ShardManifest, DenseManifest, DataManifest)


def content_digest(manifest: ShardManifest | DenseManifest) -> str:
    """SHA-256 (hexadecimal) over the content of a set, without location, provenance and notes."""
    return digest_of(manifest.model_dump(mode="json", exclude=_NOT_CONTENT))


def write_manifest(folder: Path, manifest: BaseModel) -> None:
    """Write `manifest.json` into the folder, complete or not at all.

    Raises:
        StorageError: when the disk refuses the write.
    """
    # The trailing newline makes the file a text file for git and diff.
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Read `manifest.json` of a prepared folder or of one dataset in it.

    Raises:
        DatasetError: when it is missing, unreadable or not a manifest of this kind.
    """
    path = folder / MANIFEST
    try:
        return kind.model_validate_json(path.read_bytes())
    # Before OSError, its base class: a missing permission must not be reported as a missing dataset, whose
    # fix would be to prepare everything again.
    except PermissionError as error:
        raise DatasetError(
            f"The manifest cannot be read ({error.strerror})",
            where=path,
            fix="give this user read permission for the prepared folder",
        ) from error
    except OSError as error:
        raise DatasetError(
            f"'{folder.name}' is not in the prepared data",
            where=path,
            fix="add the dataset to data.sets of the recipe and run the prepare stage again",
        ) from error
    except ValidationError as error:
        raise DatasetError(
            "The manifest is damaged or was written by another version",
            where=path,
            fix="delete the prepared folder and run the prepare stage again",
        ) from error


def read_digest(prepare_folder: Path) -> str:
    """The digest over all sets of a prepare stage's output.

    Raises:
        DatasetError: as `read_manifest`.
    """
    return read_manifest(prepare_folder, DataManifest).data_digest
