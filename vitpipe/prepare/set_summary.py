"""Summaries of prepared datasets: rows of the tables in the report, and metrics."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import hidden
from vitpipe.data.manifest import (
    FINDINGS,
    DataManifest,
    DenseManifest,
    SetManifest,
    ShardManifest,
    read_manifest,
)

Manifest = ShardManifest | DenseManifest
# The table is for reading in a browser; findings.csv next to the shards has every row.
_MAX_FINDINGS_SHOWN = 10_000


def read_prepared(folder: Path) -> dict[str, Manifest]:
    """The manifests of all sets in a prepared folder, by name.

    Raises:
        DatasetError: if a manifest is missing or damaged.
    """
    return {name: read_set(folder, name) for name in read_manifest(folder, DataManifest).sets}


def read_set(folder: Path, name: str) -> Manifest:
    """The manifest of one set of a prepared folder.

    Raises:
        DatasetError: if it is missing or damaged.
    """
    return read_manifest(folder / name, SetManifest).root


def readable_classes(manifest: Manifest) -> dict[str, str]:
    """Class key -> name for people, of a set whose keys are none, such as ImageNet's `n01440764`.

    A name that two classes share (ImageNet's crane is a bird and a machine) gets its key behind it.
    """
    names = manifest.class_names if isinstance(manifest, ShardManifest) else ()
    return told_apart(list(zip(manifest.classes, names, strict=bool(names))))


def told_apart(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Class key -> name, where there is one; a name of several classes with its key behind it.

    Args:
        pairs: key and name of every class of one set.
    """
    counts = Counter(name for _, name in pairs)
    return {key: name if counts[name] == 1 else f"{name} ({key})" for key, name in pairs if name}


def split_rows(manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One row per set and split: numbers of images and annotations, bytes, number of files, digest."""
    return [row for name, manifest in manifests.items() for row in _split_rows(name, manifest)]


def class_rows(manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One row per set and class: label, key, name, images per split."""
    return [row for name, manifest in manifests.items() for row in _class_rows(name, manifest)]


def finding_rows(folder: Path, manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One row per image with an anomaly: split, file, finding, treatment; at most 10,000 rows."""
    found = (row for name in manifests for row in _findings_of(folder / name, name))
    return list(islice(found, _MAX_FINDINGS_SHOWN))


def source_rows(
    manifests: Mapping[str, Manifest], revisions: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """One row per set: source format, encoding, location, digest, and the DVC revision of its source."""
    # All rows need the same columns, and only some sets may be tracked by DVC.
    keys = dict.fromkeys(key for revision in revisions.values() for key in revision)
    return [
        {
            "dataset": name,
            "form": manifest.form,
            "encoding": _described(manifest),
            "kept_in": _place(manifest),
            "notes": "; ".join(manifest.notes),
            "digest": manifest.digest,
            **{key: revisions.get(name, {}).get(key, "") for key in keys},
        }
        for name, manifest in manifests.items()
    ]


def totals(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Metrics of the stage: `<set>_num_train`, `<set>_num_val` (images) and `num_bytes` of all sets.

    `num_odd` counts images with a finding, `num_corrupt` those of them that were left out.
    """
    shard_sets = [manifest for manifest in manifests.values() if isinstance(manifest, ShardManifest)]
    numbers: dict[str, float] = {
        "num_corrupt": sum(manifest.findings.get("left out", 0) for manifest in shard_sets),
        "num_odd": sum(sum(manifest.findings.values()) for manifest in shard_sets),
        "num_bytes": sum(size_bytes(manifest) for manifest in manifests.values()),
    }
    for row in split_rows(manifests):
        numbers[f"{row['dataset']}_num_{row['split']}"] = row["num_images"]
    return numbers


def size_bytes(manifest: Manifest) -> int:
    """Bytes of a set's shards or archive, or of the user's files that are used in place."""
    if isinstance(manifest, DenseManifest):
        return manifest.size_bytes
    return sum(split.size_bytes for split in manifest.splits.values())


def _split_rows(name: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    for split in ("train", "val"):
        if isinstance(manifest, ShardManifest):
            own = manifest.splits[split]
            # Classification: one label per image.
            num_images, num_objects = own.num_images, own.num_images
            num_bytes, num_files = own.size_bytes, len(own.shards)
        else:
            num_images = manifest.counts[f"{split}_images"]
            # Boxes and masks of COCO; ADE20K and DAVIS have one label map per image.
            num_objects = manifest.counts.get(f"{split}_annotations", num_images)
            num_bytes, num_files = manifest.size_bytes, 1
        yield {
            "dataset": name,
            "split": split,
            "num_images": num_images,
            "num_annotations": num_objects,
            "num_classes": len(manifest.classes),
            "num_files": num_files,
            "size_bytes": num_bytes,
            "digest": manifest.digest,
        }


def _class_rows(name: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    if isinstance(manifest, DenseManifest):
        # Dense manifests do not count images per class.
        counts: tuple[tuple[Any, Any], ...] = (("", ""),) * len(manifest.classes)
        names: tuple[str, ...] = manifest.classes
    else:
        both = (manifest.splits[split].images_per_class for split in ("train", "val"))
        counts = tuple(zip(*both, strict=True))
        names = manifest.class_names or manifest.classes
    for number, (key, title, (train, val)) in enumerate(zip(manifest.classes, names, counts, strict=True)):
        yield {
            "dataset": name,
            "number": number,
            "class": key,
            "name": title,
            "num_train": train,
            "num_val": val,
        }


def _findings_of(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / FINDINGS
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {"dataset": name, **row}


def _described(manifest: Manifest) -> str:
    encoding = manifest.encoding if isinstance(manifest, ShardManifest) else None
    if encoding is None:
        return "as in the source"
    return (
        f"short side at most {encoding.short_side} ({encoding.resampling}), {encoding.format} "
        f"{encoding.quality}"
    )


def _place(manifest: Manifest) -> str:
    in_place = manifest.root if isinstance(manifest, DenseManifest) else None
    # A store URL may contain credentials, and this table is logged to MLflow.
    return hidden(str(in_place or manifest.store or "the prepared folder"))
