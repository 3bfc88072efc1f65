"""Manifests of a prepared folder: one `manifest.json` at the top, one per dataset.

    PREPARED/manifest.json              source, digest of each dataset, digest of the whole
    PREPARED/imagenet/manifest.json     classes in order, splits, shards with checksums
    PREPARED/imagenet/findings.csv      unusual images: kept, converted or left out
    PREPARED/imagenet/listing.json      modification times of what was packed; DVC does not hash it
    PREPARED/imagenet100/manifest.json  a class view: which classes of which set; it has no shards of its own
    PREPARED/coco/manifest.json         classes, counts; the archive, or the root of the user's folder

A digest covers the content of a set (checksums, class order, counts), never its location.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError, model_validator

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import MANIFEST as MANIFEST
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.files import require_regular, write_whole
from vitpipe.contracts.provenance import LISTING

FINDINGS = "findings.csv"
# Written into every manifest. Not part of the digest: a new schema does not change the data.
SCHEMA_VERSION = 3
# Provenance and location. The same images must have the same digest whether they were packed from folders,
# from the original tars or from Kaggle's layout, and wherever their shards are stored.
_NOT_CONTENT = {
    "digest", "root", "notes", "schema_version", "form", "store", "findings", "view", "layout",
}  # fmt: skip


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


class ClassView(_Frozen):
    """The set that has the shards of a class view, and the digest that it had when the view was made."""

    dataset: str
    digest: str


class ShardManifest(_Frozen):
    """A classification set in shards.

    Attributes:
        view: of a set that is some classes of another one and has no shards and no index of its own.
        classes: class folder names (for ImageNet the WordNet ids) in the order of the class numbers.
        class_names: human-readable names in the same order; may be empty.
        encoding: `None` when every file is byte for byte the source's.
        form: what it was packed from, human-readable.
        findings: number of unusual images by kind; `findings.csv` beside the manifest lists them.
        store: where shards and index are, if not beside the manifest: s3://bucket/prefix, or a folder.
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
    view: ClassView | None = None
    notes: tuple[str, ...] = ()
    digest: str

    @model_validator(mode="before")
    @classmethod
    def _without_listing(cls, values: Any) -> Any:
        # Up to version 2 it stood here. It has modification times, so that packing the same images again gave
        # another manifest; see `read_listing`.
        return (
            {key: v for key, v in values.items() if key != "listing"} if isinstance(values, dict) else values
        )


class DenseManifest(_Frozen):
    """A dense set (COCO, ADE20K, DAVIS) in its own layout: packed into `archive`, or left in place at `root`.

    Attributes:
        layout: kind of its layout; empty in manifests of earlier versions, where it is the set's name.
        counts: numbers of images, annotations or sequences by name, for example `train_images`.
        form: what it was prepared from, human-readable.
        archive: file name of the tar, beside the manifest or in `store`.
        store: s3://bucket/prefix, or a folder.
        size_bytes: of the archive or of the files at `root`.
        root: the user's folder, where nothing was packed.
        notes: what is not used, and what was repaired in its annotations.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    layout: str = ""
    classes: tuple[str, ...]
    counts: dict[str, int]
    form: str = ""
    archive: str | None = None
    archive_sha256: str | None = None
    store: str | None = None
    size_bytes: int
    root: Path | None = None
    notes: tuple[str, ...] = ()
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


class SetManifest(RootModel[ShardManifest | DenseManifest]):
    """The manifest of one dataset of either kind."""


AnyManifest = TypeVar("AnyManifest", ShardManifest, DenseManifest, DataManifest, SetManifest)


def content_digest(manifest: ShardManifest | DenseManifest) -> str:
    """SHA-256 (hexadecimal) over the content of a set, without location, provenance and notes.

    That of a class view is over the whole set's digest and the classes.
    """
    if isinstance(manifest, ShardManifest) and manifest.view is not None:
        return digest_of({"base": manifest.view.digest, "classes": manifest.classes})
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
        require_regular(path)
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


def write_listing(folder: Path, listing: str) -> None:
    """Keep the digest over names, labels and modification stamps of a set's source beside its manifest.

    Raises:
        StorageError: when the disk refuses the write.
    """
    write_whole(folder / LISTING, json.dumps({"listing": listing}) + "\n")


def read_listing(folder: Path) -> str:
    """The digest that `write_listing` has kept; empty where it is absent, as in a folder that DVC fetched."""
    # Manifests of version 2 have it themselves.
    for name in (LISTING, MANIFEST):
        try:
            return str(json.loads((folder / name).read_text(encoding="utf-8"))["listing"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


def read_digest(prepare_folder: Path) -> str:
    """The digest over all sets of a prepare stage's output.

    Raises:
        DatasetError: as `read_manifest`.
    """
    return read_manifest(prepare_folder, DataManifest).data_digest
