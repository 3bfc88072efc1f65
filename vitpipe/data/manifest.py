"""What a prepared folder holds: one `manifest.json` at the top, one per dataset.

    PREPARED/manifest.json              source, digest of each dataset, digest of the whole
    PREPARED/imagenet/manifest.json     classes in order, splits, shards with checksums
    PREPARED/imagenet/findings.csv      odd images, kept, converted or left out
    PREPARED/coco/manifest.json         classes, counts; the archive, or the root of the user's folder

A digest covers what is in a set (checksums, class order, counts), never where it lies.
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
SCHEMA_VERSION = 2
# What says where the data came from or lies now, not what it is.
_NOT_CONTENT = {"digest", "root", "notes", "schema_version", "form", "store", "listing", "findings"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One tar file: sizes in bytes, checksum hex SHA-256."""

    name: str
    num_images: int
    size_bytes: int
    sha256: str


class SplitManifest(_Frozen):
    """One split of a shard set.

    Attributes:
        index: the file with one record per image (`shards.INDEX_DTYPE`).
        hashes: the file with one perceptual hash per image (uint64), where they were asked for.
    """

    num_images: int
    images_per_class: tuple[int, ...]
    index: str
    index_sha256: str
    hashes: str | None = None
    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.size_bytes for shard in self.shards)


class Encoding(_Frozen):
    """How images were made smaller while packing; without it every file is byte for byte the source's."""

    short_side: int
    resampling: Literal["bicubic"] = "bicubic"
    format: Literal["jpeg"] = "jpeg"
    quality: int


class ShardManifest(_Frozen):
    """A classification set in shards. `class_names` are for people and may be empty.

    Attributes:
        form: what it was packed from, for people.
        findings: number of odd images by kind; `findings.csv` beside the manifest lists them.
        store: where shards and index lie, if not beside the manifest: s3://bucket/prefix, or a folder.
        listing: digest over names, labels and stamps of the source; equal means nothing to pack anew.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    splits: dict[str, SplitManifest]
    encoding: Encoding | None = None
    form: str = ""
    findings: dict[str, int] = {}  # pydantic copies defaults
    store: str | None = None
    listing: str = ""
    notes: tuple[str, ...] = ()
    digest: str


class DenseManifest(_Frozen):
    """A dense set in its own layout: packed in `archive`, or left where it is, at `root`.

    The archive lies beside the manifest, or in `store` (s3://bucket/prefix, or a folder).

    `counts` are numbers of pictures, annotations or sequences by name, for example `train_images`.
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
    """The whole prepared folder: dataset name -> digest, and one digest over all.

    `revisions` says per set at which DVC revision it was pulled, or which one the raw data had.
    """

    schema_version: int = SCHEMA_VERSION
    source: Literal["embedded", "folders", "pinned"]
    sets: dict[str, str]
    data_digest: str
    revisions: dict[str, dict[str, str]] = {}  # pydantic copies defaults


AnyManifest = TypeVar("AnyManifest", ShardManifest, DenseManifest, DataManifest)


def content_digest(manifest: ShardManifest | DenseManifest) -> str:
    """Hex SHA-256 over what the set holds; the place of the data and the notes do not count."""
    return digest_of(manifest.model_dump(mode="json", exclude=_NOT_CONTENT))


def write_manifest(folder: Path, manifest: BaseModel) -> None:
    """Write `manifest.json` into the folder."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Read `manifest.json` of a prepared folder or of one dataset in it.

    Raises:
        DatasetError: when it is missing or is not a manifest of this kind.
    """
    path = folder / MANIFEST
    try:
        return kind.model_validate_json(path.read_bytes())
    except PermissionError as error:
        raise DatasetError(
            f"The manifest may not be read ({error.strerror})",
            where=path,
            fix="give this user the right to read the prepared folder",
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
    """The digest of everything a prepare stage made.

    Raises:
        DatasetError: as `read_manifest`.
    """
    return read_manifest(prepare_folder, DataManifest).data_digest
