"""Class folders: train/<class>/<image>, val/<class>/<image>. Class numbers follow the sorted folder names."""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.sources.class_listing import (
    HELD_OUT_NOTE,
    ClassSource,
    FolderClasses,
    ImagesByClass,
)
from vitpipe.datasets.sources.synsets import names_of, read_synset_mapping

LAYOUT = "train/<class>/<image>, val/<class>/<image>"


def is_there(root: Path) -> bool:
    """Whether one of the two folders is there."""
    return (root / "train").is_dir() or (root / "val").is_dir()


def read_class_folders(root: Path, dataset: str) -> ClassSource:
    """The set as class folders in train/ and val/.

    Raises:
        DatasetError: as `source_of_folders`.
    """
    return source_of_folders(root, dataset, root / "train", root / "val")


def source_of_folders(root: Path, dataset: str, train: Path, val: Path) -> ClassSource:
    """A set whose train and val are folders of class folders.

    ImageNet-22K may have no val: a fixed share of train is held out.

    Raises:
        DatasetError: a missing folder, images not in class folders, no classes, an empty class, or train
            and val with different classes.
    """
    _need_folder(train, dataset, "make it hold one folder of images per class")
    holds_out = dataset == "imagenet22k" and not val.exists()
    if not holds_out:
        _need_folder(val, dataset, "make it hold the same class folders as train/")
    train_images = FolderClasses(train, root)
    val_images = train_images if holds_out else FolderClasses(val, root)
    need_same_classes(train_images, val_images)
    for part in {id(part): part for part in (train_images, val_images)}.values():
        refuse_empty(part)
    names = names_of(train_images.classes, read_synset_mapping(root))
    notes = order_notes(train_images.classes) + ((HELD_OUT_NOTE,) if holds_out else ())
    return ClassSource(
        dataset,
        root,
        "class folders",
        train_images.classes,
        {"train": train_images, "val": val_images},
        names,
        notes=notes,
        holds_out=holds_out,
    )


def need_same_classes(train: ImagesByClass, val: ImagesByClass) -> None:
    """Refuse splits that would number their classes differently.

    Raises:
        DatasetError: naming the odd ones.
    """
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DatasetError(
            f"{train.where.name}/ and {val.where.name}/ have different classes, for example {some(odd)}",
            where=train.where.parent,
            fix="class numbers come from the sorted folder names: make both hold the same folders",
        )


def refuse_empty(part: FolderClasses) -> None:
    """Refuse class folders without images.

    Raises:
        DatasetError: naming them.
    """
    empty = part.empty(part.classes)
    if empty:
        raise DatasetError(
            f"{len(empty)} class folders are empty: {some(empty)}",
            where=part.where,
            fix="unpack their images, or remove the folders from train/ and val/",
        )


def order_notes(classes: tuple[str, ...]) -> tuple[str, ...]:
    """A warning when folders are named by numbers, which sort as text."""
    if not all(name.isdecimal() for name in classes) or list(classes) == sorted(classes, key=int):
        return ()
    first = ", ".join(classes[:3])
    return (f"class folders are named by numbers and sorted as text: class numbers 0, 1, 2 are {first}",)


def _need_folder(folder: Path, dataset: str, fix: str) -> None:
    if not folder.is_dir():
        raise DatasetError(f"A folder of the dataset '{dataset}' is missing", where=folder, fix=fix)
