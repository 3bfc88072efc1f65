"""Class folders train/<class>/<image>, val/<class>/<image>. Class numbers follow the sorted folder names."""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.sources.class_listing import (
    HELD_OUT_NOTE,
    ClassSource,
    FolderClasses,
    ImagesByClass,
)
from vitpipe.datasets.sources.source import Form
from vitpipe.datasets.sources.synsets import names_of, read_synset_mapping

LAYOUT = "train/<class>/<image>, val/<class>/<image>"


def has_class_folders(root: Path) -> bool:
    """Whether one of the two folders exists."""
    return (root / "train").is_dir() or (root / "val").is_dir()


def read_class_folders(root: Path, dataset: str) -> ClassSource:
    """Read a set of class folders in train/ and val/.

    Raises:
        DatasetError: as `source_of_folders`.
    """
    return source_of_folders(root, dataset, root / "train", root / "val")


def source_of_folders(root: Path, dataset: str, train: Path, val: Path) -> ClassSource:
    """A set whose train and val are folders of class folders.

    ImageNet-22K may lack val: a fixed share of train is held out instead.

    Raises:
        DatasetError: a missing folder, images outside class folders, no classes, an empty class, or train
            and val with different classes.
    """
    _require_folder(train, dataset, "put one folder of images per class into it")
    # An existing but empty val/ is an error: it was meant to hold images.
    holds_out = dataset == "imagenet22k" and not val.exists()
    if not holds_out:
        _require_folder(val, dataset, "put the same class folders as in train/ into it")
    train_images = FolderClasses(train, root)
    val_images = train_images if holds_out else FolderClasses(val, root)
    require_same_classes(train_images, val_images)
    # One object for both splits when val is held out: scan its folders once.
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


def require_same_classes(train: ImagesByClass, val: ImagesByClass) -> None:
    """Refuse splits with different classes, whose class numbers would differ.

    Raises:
        DatasetError: naming the classes that only one split has.
    """
    # One extra folder shifts the numbers of all classes that sort behind it: accuracy drops without an error.
    if train.classes != val.classes:
        unshared = sorted(set(train.classes) ^ set(val.classes))
        raise DatasetError(
            f"{train.where.name}/ and {val.where.name}/ have different classes, for example {some(unshared)}",
            where=train.where.parent,
            fix="put the same class folders into both: class numbers follow the sorted folder names",
        )


def refuse_empty(part: FolderClasses) -> None:
    """Refuse class folders without images.

    Raises:
        DatasetError: naming them.
    """
    empty = part.empty(part.classes)
    if empty:
        raise DatasetError(
            f"{counted(len(empty), 'class folder is', 'class folders are')} empty: {some(empty)}",
            where=part.where,
            fix="unpack their images, or remove the folders from train/ and val/",
        )


def order_notes(classes: tuple[str, ...]) -> tuple[str, ...]:
    """A note when folders are named by numbers, which sort as text."""
    # Text order is kept because torchvision's ImageFolder, and so released checkpoints, number classes by it.
    if not all(name.isdecimal() for name in classes) or list(classes) == sorted(classes, key=int):
        return ()
    first = ", ".join(classes[:3])
    return (f"class folders are named by numbers and sorted as text: classes 0, 1, 2 are {first}",)


def _require_folder(folder: Path, dataset: str, fix: str) -> None:
    if not folder.is_dir():
        raise DatasetError(f"A folder of the dataset '{dataset}' is missing", where=folder, fix=fix)


FORMAT = Form(lambda _: (LAYOUT,), lambda root, _: has_class_folders(root), read_class_folders)
