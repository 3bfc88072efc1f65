"""COCO 2017 (Lin et al., ECCV 2014): train2017/, val2017/, annotations/, or the three zips that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.layouts.file_tree import (
    DenseLayout,
    FileTree,
    Layout,
    OriginalArchive,
    evenly_spaced,
    open_tree,
    require_files,
    require_folder,
)
from vitpipe.datasets.layouts.image_headers import Look, size_of

_ANNOTATIONS = "annotations_trainval2017.zip"
_INSTANCES = tuple(f"annotations/instances_{split}2017.json" for split in ("train", "val"))
# The fields that are used below. Others (license, coco_url, ...) may be absent.
_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
ARCHIVES = (
    OriginalArchive("train2017.zip", ("train2017",)),
    OriginalArchive("val2017.zip", ("val2017",)),
    OriginalArchive(_ANNOTATIONS, _INSTANCES),
)


def verify_coco(root: Path, dataset: str = "coco") -> DenseLayout:
    """Verify a COCO 2017 folder: annotations and the images that they list.

    Raises:
        DatasetError: a missing folder or file, damaged JSON, annotations that refer to missing images or
            categories, an archive that is refused.
    """
    root, tree = open_tree(root, dataset, ARCHIVES)
    counts: dict[str, int] = {}
    files: list[str] = []
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    for split, instances in zip(("train", "val"), _INSTANCES, strict=True):
        content = _read_annotations(tree, instances)
        found = tuple(category["name"] for category in content["categories"])
        # One list of classes serves both splits (`DenseLayout.classes`).
        if classes and found != classes:
            raise DatasetError(
                "The train and val annotations have different categories",
                where=tree.where(instances),
                fix=f"use both files of the same {_ANNOTATIONS}",
            )
        classes, folder = found, f"{split}2017"
        require_folder(tree, folder, dataset, f"put {folder}.zip into the set's folder, or unpack it there")
        listed = [image["file_name"] for image in content["images"]]
        fix = f"unpack {folder}.zip completely, or remove the folder and keep {folder}.zip"
        # Compared with a listing and never opened by name: a name with ".." in the JSON is a missing file.
        present = tree.names(folder)
        require_files(listed, present, tree.where(folder), fix)
        if extra := sorted(set(present) - set(listed)):
            notes.append(f"{len(extra)} files of {folder}/ are not in the annotations: {some(extra)}")
        _check_references(content, tree.where(instances))
        counts[f"{split}_images"], counts[f"{split}_annotations"] = len(listed), len(content["annotations"])
        files += [instances, *(f"{folder}/{name}" for name in listed)]
    return DenseLayout(dataset, "coco", root, classes, counts, tuple(sorted(files)), tree, tuple(notes))


def look_into_coco(layout: DenseLayout, number: int | None) -> Look:
    """Compare the sizes of images with those in the annotations, for `number` images or all."""
    problems: list[DatasetError] = []
    num_looked = 0
    for instances in _INSTANCES:
        images = _read_annotations(layout.tree, instances)["images"]
        folder = instances.rpartition("_")[2].removesuffix(".json")
        stated = {f"{folder}/{image['file_name']}": (image["width"], image["height"]) for image in images}
        # The sample is divided between the splits by their sizes, at least one image each.
        looked = evenly_spaced(sorted(stated), number and max(1, number * len(images) // _num_images(layout)))
        wrong, broken = [], []
        for name in looked:
            size = size_of(layout.tree, name)
            if isinstance(size, str):
                broken.append(f"{name} ({size})")
            elif size != stated[name]:
                wrong.append("{} ({}x{} instead of {}x{})".format(name, *size, *stated[name]))
        num_looked += len(looked)
        problems += _size_problems(layout, instances, wrong, broken)
    return Look(num_looked, tuple(problems))


def _size_problems(
    layout: DenseLayout, instances: str, wrong: list[str], broken: list[str]
) -> Iterator[DatasetError]:
    if broken:
        yield DatasetError(
            f"{len(broken)} images cannot be decoded: {some(broken)}",
            where=layout.root,
            fix="unpack them from the original zip again",
        )
    if wrong:
        yield DatasetError(
            f"{len(wrong)} images have another size than in their annotations: {some(wrong)}",
            where=layout.tree.where(instances),
            fix="use images and annotations of the same release, and do not resize the images: "
            "boxes and masks are in pixels of the original",
        )


def _num_images(layout: DenseLayout) -> int:
    return layout.counts["train_images"] + layout.counts["val_images"]


def _read_annotations(tree: FileTree, name: str) -> dict[str, Any]:
    if not tree.is_file(name):
        raise DatasetError(
            "The annotations are missing",
            where=tree.where(name),
            fix=f"put {_ANNOTATIONS} into the set's folder, or unpack it there",
        )
    try:
        content = json.loads(tree.read(name), object_hook=_without_polygons)
        kept = {key: content[key] for key in ("images", "annotations", "categories")}
        for listing, fields in _FIELDS.items():
            for field, kind in fields.items():
                if not all(isinstance(entry[field], kind) for entry in kept[listing]):
                    raise TypeError(f"'{field}' of {listing} must be {kind.__name__}")
        return kept
    # Damaged, cut off, of another structure, or nested without end (RecursionError of `json`).
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"The annotations are damaged ({type(error).__name__}: {error})",
            where=tree.where(name),
            fix=f"unpack {_ANNOTATIONS} again",
        ) from error


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop the segmentation of an annotation."""
    # While parsing, to save memory: polygons are nine tenths of the file of 0.5 GB and are not checked here.
    entry.pop("segmentation", None)
    return entry


def _check_references(content: dict[str, Any], where: str) -> None:
    """Check that every annotation refers to a listed image and category."""
    for key, listed in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[listed]}
        unknown = sorted({a[key] for a in content["annotations"]} - known)
        if unknown:
            raise DatasetError(
                f"Annotations refer to {len(unknown)} {listed} that are not listed, for example {unknown[0]}",
                where=where,
                fix="use annotations and images of the same release",
            )


LAYOUT = Layout(verify_coco, look_into_coco)
