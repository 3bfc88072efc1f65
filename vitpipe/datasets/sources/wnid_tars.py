"""Tars of one class each, <wnid>.tar, in a folder or in a tar: read in their place, nothing is unpacked.

ImageNet-22K comes so: fall11_whole.tar (fall 2011, 21,841 classes) is a tar of such tars,
winter21_whole.tar.gz (winter 2021, 19,167 classes) unpacks to a folder of them. ImageNet-21K-P, made from
either (Ridnik et al., "ImageNet-21K Pretraining for the Masses", 2021), lies as imagenet21k_train/<wnid>/ and
imagenet21k_val/<wnid>/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.archives import safe_tar_members
from vitpipe.datasets.sources.byte_ranges import FileSpan
from vitpipe.datasets.sources.class_folders import need_same_classes, source_of_folders
from vitpipe.datasets.sources.class_listing import (
    HELD_OUT_NOTE,
    ClassSource,
    FolderClasses,
    FoundImage,
    ImagesByClass,
    has_subfolders,
    shown_below,
    visible_names,
)
from vitpipe.datasets.sources.synsets import WNID, names_of, read_synset_mapping

LAYOUT_22K = (
    "train/<wnid>/<image> with or without val/<wnid>/<image>",
    "imagenet21k_train/<wnid>/<image> and imagenet21k_val/<wnid>/<image> (ImageNet-21K-P), or one "
    "<wnid>.tar per class in each",
    "winter21_whole/<wnid>.tar",
    "fall11_whole.tar, or its tars in fall11_whole/ or fall11/",
)
_FOLDER_PAIRS = (
    ("train", "val"),
    ("imagenet21k_train", "imagenet21k_val"),
    ("imagenet21k_resized/imagenet21k_train", "imagenet21k_resized/imagenet21k_val"),
)
_TAR_FOLDERS = ("winter21_whole", "fall11_whole", "fall11", "train", ".")
_TARS_OF_TARS = ("fall11_whole.tar", "winter21_whole.tar")
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_UNFINISHED = re.compile(r"n\d{8}\.tar\..+|\.?n\d{8}\.tar[~_-].*")
# An empty tar is padded to this size by GNU tar.
_EMPTY_TAR_BYTES = 10240


class TarClasses(ImagesByClass):
    """One tar per class; each is listed only when its class is asked for.

    Args:
        tars: where each class's tar lies: a file, or a part of one.
        where: the folder or the tar that holds them.
        shown: path below the set's folder that the tars are shown under.
    """

    def __init__(self, tars: dict[str, FileSpan], where: Path, shown: str) -> None:
        self._tars, self.where, self._shown = tars, where, shown
        self.classes = tuple(sorted(tars))

    def images(self, key: str) -> list[FoundImage]:
        """The files of the class's tar."""
        tar = self._tars[key]
        found = []
        for member in safe_tar_members(Path(tar.path), offset=tar.offset, size_bytes=tar.size_bytes):
            name = PurePosixPath(member.name).name
            if not name.startswith("."):
                place = FileSpan(tar.path, member.offset, member.size_bytes)
                found.append(FoundImage(name, place, f"{self._shown}{key}.tar/{member.name}"))
        if not found:
            raise DatasetError(
                f"'{key}.tar' holds no images", where=self.where, fix="get it again, or remove the class"
            )
        return sorted(found, key=lambda image: (image.name, image.shown))

    def refuse_empty(self) -> None:
        """Look into the tars that are too small to hold an image; seconds, where packing may take days.

        Raises:
            DatasetError: when one of them is empty.
        """
        for key, tar in self._tars.items():
            size = Path(tar.path).stat().st_size if tar.size_bytes is None else tar.size_bytes
            if size <= _EMPTY_TAR_BYTES:
                self.images(key)


def tars_in_folder(folder: Path, root: Path) -> TarClasses:
    """The <wnid>.tar files of a folder; others are passed over.

    Raises:
        DatasetError: when there are none, or some look like unfinished downloads.
    """
    names = visible_names(folder)
    unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
    if unfinished:
        raise DatasetError(
            f"{len(unfinished)} downloads look unfinished: {some(unfinished)}",
            where=folder,
            fix="finish them, or remove these files",
        )
    tars = {match[1]: FileSpan(str(folder / name)) for name in names if (match := _CLASS_TAR.fullmatch(name))}
    if not tars:
        raise DatasetError("There are no <wnid>.tar files", where=folder, fix="put them there")
    return TarClasses(tars, folder, shown_below(folder, root))


def tars_in_tar(path: Path, root: Path) -> TarClasses:
    """The <wnid>.tar members of a tar, found by its headers.

    Raises:
        DatasetError: when the tar is damaged or holds anything else.
    """
    tars, odd = {}, []
    for member in safe_tar_members(path):
        name = PurePosixPath(member.name).name
        if match := _CLASS_TAR.fullmatch(name):
            if match[1] in tars:
                raise DatasetError(f"There are two '{name}' in it", where=path, fix="get the archive again")
            tars[match[1]] = FileSpan(str(path), member.offset, member.size_bytes)
        elif not name.startswith("."):
            odd.append(member.name)
    if odd or not tars:
        found = f"also {len(odd)} other files: {some(odd)}" if odd else "nothing of the kind"
        raise DatasetError(
            f"The archive should hold one <wnid>.tar per class, and holds {found}",
            where=path,
            fix=f"get the original {path.name} again, or unpack yours as train/<class>/<image>",
        )
    return TarClasses(tars, path, f"{shown_below(path.parent, root)}{path.name}/")


def has_class_tars(folder: Path) -> bool:
    """Whether a folder holds <wnid>.tar files."""
    return folder.is_dir() and any(_CLASS_TAR.fullmatch(name) for name in visible_names(folder))


def is_22k_there(root: Path) -> bool:
    """Whether anything of ImageNet-22K or of its archives is there."""
    names = [name for pair in _FOLDER_PAIRS for name in pair] + [*_TARS_OF_TARS, *_TAR_FOLDERS[:-1]]
    return (
        any((root / name).exists() for name in names)
        or _are_classes(root)
        or has_class_tars(root)
        or bool(_compressed(root))
    )


def read_22k(root: Path, dataset: str) -> ClassSource:
    """ImageNet-22K or ImageNet-21K-P in any of its forms; folders go before archives.

    Raises:
        DatasetError: when none is complete, as `source_of_folders` and `tars_in_tar`.
    """
    for train, val in _FOLDER_PAIRS:
        if has_subfolders(root / train):
            return source_of_folders(root, dataset, root / train, root / val)
        if has_class_tars(root / train) and has_class_tars(root / val):
            return _pair_of_tars(root, dataset, root / train, root / val)
    for folder in (root / name for name in _TAR_FOLDERS):
        if _are_classes(folder):
            return _held_out(root, dataset, FolderClasses(folder, root), f"class folders in {folder.name}/")
    for folder in (root / name for name in _TAR_FOLDERS):
        if has_class_tars(folder):
            return _held_out(
                root, dataset, tars_in_folder(folder, root), f"one tar per wnid in {folder.name}/"
            )
    for name in _TARS_OF_TARS:
        if (root / name).is_file():
            return _held_out(root, dataset, tars_in_tar(root / name, root), f"{name}, a tar of tars")
    if compressed := _compressed(root):
        raise DatasetError(
            f"{compressed[0]} must be unpacked first: a compressed tar cannot be read by position",
            where=root / compressed[0],
            fix=f"run: tar -xzf {compressed[0]}; the <wnid>.tar files inside stay as they are",
        )
    # A folder is there and holds no classes: its own message says what should be in it.
    return source_of_folders(root, dataset, root / "train", root / "val")


def _pair_of_tars(root: Path, dataset: str, train: Path, val: Path) -> ClassSource:
    """A division into train and val, each one tar per class."""
    train_images, val_images = (tars_in_folder(folder, root) for folder in (train, val))
    need_same_classes(train_images, val_images)
    for part in (train_images, val_images):
        part.refuse_empty()
    names = names_of(train_images.classes, read_synset_mapping(root))
    form = f"one tar per wnid in {train.name}/ and {val.name}/"
    parts: dict[str, ImagesByClass] = {"train": train_images, "val": val_images}
    return ClassSource(dataset, root, form, train_images.classes, parts, names)


def _held_out(root: Path, dataset: str, train: FolderClasses | TarClasses, form: str) -> ClassSource:
    if isinstance(train, TarClasses):
        train.refuse_empty()
    elif empty := train.empty(train.classes):
        raise DatasetError(
            f"{len(empty)} class folders are empty: {some(empty)}",
            where=train.where,
            fix="unpack their images, or remove the folders",
        )
    names = names_of(train.classes, read_synset_mapping(root))
    parts: dict[str, ImagesByClass] = {"train": train, "val": train}
    return ClassSource(
        dataset, root, form, train.classes, parts, names, notes=(HELD_OUT_NOTE,), holds_out=True
    )


def _are_classes(folder: Path) -> bool:
    """Whether a folder's folders are named by wnids, all of them."""
    return has_subfolders(folder) and all(
        WNID.fullmatch(name) for name in visible_names(folder) if (folder / name).is_dir()
    )


def _compressed(root: Path) -> list[str]:
    known: Iterable[str] = visible_names(root) if root.is_dir() else ()
    return [name for name in known if re.fullmatch(r"(fall11|winter21|imagenet21k).*\.(tar\.gz|tgz)", name)]
