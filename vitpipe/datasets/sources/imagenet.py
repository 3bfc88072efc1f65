"""ImageNet-1K (ILSVRC 2012) in its released formats, and in mixtures of them.

    folders    train/<wnid>/*.JPEG, val/<wnid>/*.JPEG
    original   ILSVRC2012_img_train.tar (a tar of 1000 tars), ILSVRC2012_img_val.tar (flat),
               ILSVRC2012_devkit_t12.tar.gz
    Kaggle     ILSVRC/Data/CLS-LOC/{train/<wnid>/, val/ (flat)}, LOC_val_solution.csv, LOC_synset_mapping.txt

Train and val are detected independently, because users often unpack only one of them. Flat validation
images get their classes from the devkit or from Kaggle's list. Class numbers follow the sorted wnids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import safe_tar_members
from vitpipe.datasets.sources.byte_ranges import FileSpan
from vitpipe.datasets.sources.class_folders import order_notes, refuse_empty, require_same_classes
from vitpipe.datasets.sources.class_listing import (
    ClassSource,
    FolderClasses,
    FoundImage,
    ImagesByClass,
    first_existing,
    has_subfolders,
    shown_below,
    visible_names,
)
from vitpipe.datasets.sources.source import Form
from vitpipe.datasets.sources.synsets import names_of, read_synset_mapping
from vitpipe.datasets.sources.val_labels import (
    DEVKIT,
    GROUND_TRUTH,
    SOLUTION,
    ValLabels,
    find_val_labels,
    label_images,
)
from vitpipe.datasets.sources.wnid_tars import TarClasses, has_class_tars, tars_in_folder, tars_in_tar

LAYOUT = (
    "train/<class>/<image>, val/<class>/<image>",
    f"ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and {DEVKIT}.tar.gz",
    f"Kaggle's ILSVRC/Data/CLS-LOC/ with {SOLUTION} and LOC_synset_mapping.txt",
)
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_FOLDERS, _KAGGLE, _TARS = "class folders", "Kaggle's folders", "the original tar"
_FLAT = "flat images"
_NAMES = {
    (_FOLDERS, _FOLDERS): "class folders",
    (_KAGGLE, _KAGGLE): "Kaggle's layout",
    (_TARS, _TARS): "the original tars and devkit",
}


class _Part(NamedTuple):
    """One split in the format in which it was found."""

    path: Path
    kind: str


def has_imagenet(root: Path) -> bool:
    """Whether any part of ImageNet-1K exists, in any format but parquet."""
    # Labels alone count: the error then names the missing images, instead of an unknown format.
    labels = (SOLUTION, f"{DEVKIT}.tar.gz", DEVKIT)
    return (
        bool(_train_parts(root) or _val_parts(root))
        or any((root / name).exists() for name in ("train", "val", *labels))
        or bool(_packed_kaggle(root))
    )


def read_imagenet(root: Path, dataset: str) -> ClassSource:
    """Read ImageNet-1K in any mixture of formats; folders take precedence over archives.

    Raises:
        DatasetError: when a part is missing or damaged, or the parts do not belong together.
    """
    trains, vals = _train_parts(root), _val_parts(root)
    train_part = trains[0] if trains else _no_train(root, dataset)
    val_part = vals[0] if vals else _no_val(root, dataset)
    unread = [str(part.path.relative_to(root)) for part in (*trains[1:], *vals[1:])]
    try:
        train = _train_images(train_part, root)
        # Class folders in val/ carry the labels; anything else is flat and needs a list.
        labels = None if has_subfolders(val_part.path) else _labels(root, val_part)
        val = _val_images(val_part, labels, root)
        _require_same_classes(train, val, labels)
        for part in (train, val):
            if isinstance(part, FolderClasses):
                refuse_empty(part)
    except DatasetError as error:
        if not unread:
            raise
        # No silent fallback to the archive: a half unpacked folder would go unnoticed.
        instead = f"; or move it away, to read {some(unread)} in its place"
        raise DatasetError(error.what, where=error.where, fix=error.fix + instead) from error
    names = labels.class_names if labels else read_synset_mapping(root, root / "ILSVRC")
    notes = order_notes(train.classes)
    if unread:
        notes += (f"not read, because folders take precedence over archives: {', '.join(unread)}",)
    kinds = (train_part.kind, val_part.kind)
    form = _NAMES.get(kinds, f"train: {kinds[0]}, val: {kinds[1]}")
    parts = {"train": train, "val": val}
    return ClassSource(dataset, root, form, train.classes, parts, names_of(train.classes, names), notes=notes)


def _train_parts(root: Path) -> list[_Part]:
    """Every path with training images, the preferred one first."""
    kaggle, unpacked = _kaggle_folder(root) / "train", (root / "train", root / "ILSVRC2012_img_train", root)
    parts = [_Part(root / "train", _FOLDERS)] if has_subfolders(root / "train") else []
    parts += [_Part(kaggle, _KAGGLE)] if has_subfolders(kaggle) else []
    # With class folders in train/, tars are not reported as an unread copy; `class_folders_of` refuses
    # train/ if some of its tars are not unpacked.
    if not parts or parts[0].path != root / "train":
        parts += [_Part(folder, "one tar per wnid") for folder in unpacked if has_class_tars(folder)]
    return parts + ([_Part(root / TRAIN_TAR, _TARS)] if (root / TRAIN_TAR).is_file() else [])


def _val_parts(root: Path) -> list[_Part]:
    """Every path with validation images, the preferred one first."""
    kaggle = _kaggle_folder(root) / "val"
    parts = [_Part(root / "val", _FOLDERS)] if has_subfolders(root / "val") else []
    # Kaggle's val is flat, hence `is_dir`; its train has class folders.
    parts += [_Part(kaggle, _KAGGLE)] if kaggle.is_dir() else []
    flat = (root / "val", root / "ILSVRC2012_img_val")
    parts += [
        _Part(folder, _FLAT)
        for folder in flat
        if folder.is_dir() and not has_subfolders(folder) and visible_names(folder)
    ]
    return parts + ([_Part(root / VAL_TAR, _TARS)] if (root / VAL_TAR).is_file() else [])


def _kaggle_folder(root: Path) -> Path:
    # The whole tree as unpacked, or moved up by one or two levels.
    folders = [root / name for name in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")]
    return first_existing(*folders) or folders[0]


def _train_images(part: _Part, root: Path) -> FolderClasses | TarClasses:
    if part.path.is_file():
        images = tars_in_tar(part.path, root)
    elif part.kind in (_FOLDERS, _KAGGLE):
        return FolderClasses(part.path, root)
    else:
        images = tars_in_folder(part.path, root)
    images.refuse_empty()
    return images


def _val_images(part: _Part, labels: ValLabels | None, root: Path) -> ImagesByClass:
    if labels is None:
        return FolderClasses(part.path, root)
    images = _images_of_tar(part.path, root) if part.path.is_file() else _images_of_folder(part.path, root)
    return label_images(list(images), labels, part.path)


def _images_of_tar(path: Path, root: Path) -> Iterator[FoundImage]:
    shown = f"{shown_below(path.parent, root)}{path.name}/"
    for member in safe_tar_members(path):
        name = PurePosixPath(member.name).name
        if not name.startswith("."):
            byte_range = FileSpan(str(path), member.offset, member.size_bytes)
            yield FoundImage(name, byte_range, f"{shown}{member.name}")


def _images_of_folder(folder: Path, root: Path) -> Iterator[FoundImage]:
    shown = shown_below(folder, root)
    for name in visible_names(folder):
        yield FoundImage(name, FileSpan(f"{folder}/{name}"), f"{shown}{name}")


def _labels(root: Path, part: _Part) -> ValLabels | None:
    """Labels of flat images; None for a folder, for which `class_folders_of` raises the better message."""
    labels = find_val_labels(root)
    if labels is None and part.path.is_file():
        raise DatasetError(
            "The classes of the validation images are missing: the tar has no class folders",
            where=root,
            fix=f"put {DEVKIT}.tar.gz (2.5 MB; it has {GROUND_TRUTH}) or Kaggle's {SOLUTION} into it",
        )
    return labels


def _require_same_classes(
    train: FolderClasses | TarClasses, val: ImagesByClass, labels: ValLabels | None
) -> None:
    if isinstance(train, FolderClasses) and isinstance(val, FolderClasses):
        return require_same_classes(train, val)
    # The devkit's synsets as well, so that classes without a validation image count.
    known = set(val.classes) | set(labels.class_names if labels else ())
    where_known = labels.where if labels else val.where
    if unknown := sorted(set(train.classes) - known):
        raise DatasetError(
            f"{counted(len(unknown), 'training class is', 'training classes are')} unknown to "
            f"{where_known.name}: {some(unknown)}",
            where=train.where,
            fix=f"remove them if they are not of ILSVRC2012, or get {where_known.name} again",
        )
    if missing := sorted(known - set(train.classes)):
        raise DatasetError(
            f"{counted(len(missing), 'class', 'classes')} of {where_known.name} without training "
            f"images: {some(missing)}",
            where=train.where,
            fix=f"unpack or get {TRAIN_TAR} completely; it holds one tar for each of them",
        )
    return None


def _no_train(root: Path, dataset: str) -> _Part:
    if (root / "train").is_dir():
        return _Part(root / "train", _FOLDERS)
    if packed := _packed_kaggle(root):
        raise DatasetError(
            f"{packed} must be unpacked first",
            where=root / packed,
            fix=f"unpack it into {root}, which creates ILSVRC/",
        )
    raise DatasetError(
        f"The training images of the dataset '{dataset}' are missing",
        where=root / "train",
        fix=f"put {TRAIN_TAR} into {root}, or one folder of images per class into train/",
    )


def _no_val(root: Path, dataset: str) -> _Part:
    if (root / "val").is_dir():
        return _Part(root / "val", _FOLDERS)
    raise DatasetError(
        f"The validation images of the dataset '{dataset}' are missing",
        where=root / "val",
        fix=f"put {VAL_TAR} and {DEVKIT}.tar.gz into {root}, "
        "or the same class folders as in train/ into val/",
    )


def _packed_kaggle(root: Path) -> str | None:
    """The name of Kaggle's archive, or None. It must be unpacked before."""
    # imagenet-object-localization-challenge.zip or imagenet_object_localization_patched2019.tar.gz; a
    # compressed tar cannot be read by byte range.
    known = visible_names(root) if root.is_dir() else []
    return next(
        (name for name in known if name.startswith(("imagenet-object-loc", "imagenet_object_loc"))), None
    )


FORMAT = Form(lambda _: LAYOUT, lambda root, _: has_imagenet(root), read_imagenet)
