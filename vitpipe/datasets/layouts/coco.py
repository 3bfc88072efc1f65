"""COCO 2017 (Lin et al., ECCV 2014): train2017/, val2017/, annotations/, or the three zips that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.layouts.coco_annotations import ANNOTATIONS, SPLITS, instances_of, read_annotations
from vitpipe.datasets.layouts.file_tree import (
    DenseLayout,
    Layout,
    OriginalArchive,
    Remark,
    evenly_spaced,
    open_tree,
    require_files,
    require_folder,
)
from vitpipe.datasets.layouts.image_headers import Look, sizes_of

ARCHIVES = (
    OriginalArchive("train2017.zip", ("train2017",)),
    OriginalArchive("val2017.zip", ("val2017",)),
    OriginalArchive(ANNOTATIONS, tuple(instances_of(split) for split in SPLITS)),
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
    remarks: list[Remark] = []
    sizes: dict[str, tuple[int, int]] = {}
    classes: tuple[str, ...] = ()
    for split in SPLITS:
        instances, folder = instances_of(split), f"{split}2017"
        annotations = read_annotations(tree, split)
        content, remarks = annotations.content, [*remarks, *annotations.remarks]
        found = tuple(category["name"] for category in content["categories"])
        # One list of classes serves both splits (`DenseLayout.classes`).
        if classes and found != classes:
            raise DatasetError(
                "The train and val annotations have different categories, or other ids for them",
                where=tree.where(instances),
                fix=f"use both files of the same {ANNOTATIONS}",
            )
        classes = found
        require_folder(tree, folder, dataset, f"put {folder}.zip into the set's folder, or unpack it there")
        listed = [image["file_name"] for image in content["images"]]
        fix = f"unpack {folder}.zip completely, or remove the folder and keep {folder}.zip"
        # Compared with a listing and never opened by name: a name with ".." in the JSON is a missing file.
        present = tree.names(folder)
        require_files(listed, present, tree.where(folder), fix)
        if extra := sorted(set(present) - set(listed)):
            notes.append(f"{counted(len(extra), 'file')} of {folder}/ not in the annotations: {some(extra)}")
        counts[f"{split}_images"], counts[f"{split}_annotations"] = len(listed), len(content["annotations"])
        sizes |= {
            f"{folder}/{image['file_name']}": (image["width"], image["height"]) for image in content["images"]
        }
        files += [instances, *(f"{folder}/{name}" for name in listed)]
    return DenseLayout(
        dataset,
        "coco",
        root,
        classes,
        counts,
        tuple(sorted(files)),
        tree,
        tuple(notes),
        tuple(remarks),
        stated_sizes=sizes,
    )


def look_into_coco(layout: DenseLayout, number: int | None) -> Look:
    """Compare the sizes of images with those in the annotations, for `number` images or all."""
    problems: list[DatasetError] = []
    num_looked = 0
    for split in SPLITS:
        prefix = f"{split}2017/"
        stated = {name: size for name, size in layout.stated_sizes.items() if name.startswith(prefix)}
        # The sample is divided between the splits by their sizes, at least one image each.
        looked = evenly_spaced(sorted(stated), number and max(1, number * len(stated) // _num_images(layout)))
        wrong, broken = [], []
        for name, size in zip(looked, sizes_of(layout.tree, looked), strict=True):
            if isinstance(size, str):
                broken.append(f"{name} ({size})")
            elif size != stated[name]:
                wrong.append("{} ({}x{} instead of {}x{})".format(name, *size, *stated[name]))
        num_looked += len(looked)
        problems += _size_problems(layout, instances_of(split), wrong, broken)
    return Look(num_looked, tuple(problems))


def _size_problems(
    layout: DenseLayout, instances: str, wrong: list[str], broken: list[str]
) -> Iterator[DatasetError]:
    if broken:
        yield DatasetError(
            f"{counted(len(broken), 'image')} cannot be decoded: {some(broken)}",
            where=layout.root,
            fix="unpack them from the original zip again",
        )
    if wrong:
        yield DatasetError(
            f"{counted(len(wrong), 'image has', 'images have')} another size than in their "
            f"annotations: {some(wrong)}",
            where=layout.tree.where(instances),
            fix="use images and annotations of the same release, and do not resize the images: "
            "boxes and masks are in pixels of the original",
        )


def _num_images(layout: DenseLayout) -> int:
    return layout.counts["train_images"] + layout.counts["val_images"]


def pictures_of_coco(files: Sequence[str], split: str, read: Callable[[str], bytes]) -> list[str]:
    """The pictures of a split, also those without any object; see `Layout.pictures`."""
    return [name for name in files if name.startswith(f"{split}2017/")]


LAYOUT = Layout(verify_coco, look_into_coco, pictures_of_coco)
