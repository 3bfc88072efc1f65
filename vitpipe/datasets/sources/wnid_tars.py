"""One tar per class, <wnid>.tar, in a folder or within a tar; read in place, without unpacking.

ImageNet-22K is released like this: fall11_whole.tar (fall 2011, 21,841 classes) is a tar of such tars,
winter21_whole.tar.gz (winter 2021, 19,167 classes) unpacks to a folder of them. ImageNet-21K-P, made from
either (Ridnik et al., "ImageNet-21K Pretraining for the Masses", 2021), has imagenet21k_train/<wnid>/ and
imagenet21k_val/<wnid>/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import safe_tar_members
from vitpipe.datasets.sources.byte_ranges import FileSpan
from vitpipe.datasets.sources.class_folders import require_same_classes, source_of_folders
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
from vitpipe.datasets.sources.source import Form
from vitpipe.datasets.sources.synsets import WNID, names_of, read_synset_mapping

LAYOUT_22K = (
    "train/<wnid>/<image> with or without val/<wnid>/<image>",
    "imagenet21k_train/<wnid>/<image> and imagenet21k_val/<wnid>/<image> (ImageNet-21K-P), or one "
    "<wnid>.tar per class in each",
    "winter21_whole/<wnid>.tar",
    "fall11_whole.tar, or its tars in fall11_whole/ or fall11/",
)
# ImageNet-21K-P is released as imagenet21k_resized.tar.gz, which unpacks to a folder of that name.
_FOLDER_PAIRS = (
    ("train", "val"),
    ("imagenet21k_train", "imagenet21k_val"),
    ("imagenet21k_resized/imagenet21k_train", "imagenet21k_resized/imagenet21k_val"),
)
_TAR_FOLDERS = ("winter21_whole", "fall11_whole", "fall11", "train", ".")
_TARS_OF_TARS = ("fall11_whole.tar", "winter21_whole.tar")
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
# Names that download tools give to partial files: n01440764.tar.part, .tar.aria2, .tar~, .tar-1.
_UNFINISHED = re.compile(r"n\d{8}\.tar\..+|\.?n\d{8}\.tar[~_-].*")
# GNU tar pads every archive to a multiple of 20 blocks of 512 bytes, so an empty one has this size.
_EMPTY_TAR_BYTES = 10240


class TarClasses(ImagesByClass):
    """One tar per class; each is listed only when its class is requested.

    Args:
        tars: by class, its tar: a file, or a part of one.
        where: the folder or the tar that contains them.
        shown: display path of the tars below the set's folder.
    """

    def __init__(self, tars: dict[str, FileSpan], where: Path, shown: str) -> None:
        self._tars, self.where, self._shown = tars, where, shown
        self.classes = tuple(sorted(tars))

    def images(self, key: str) -> list[FoundImage]:
        """The files of the class's tar."""
        # Not cached: the list of one class is short-lived, that of all classes would be millions of entries.
        tar = self._tars[key]
        found = []
        for member in safe_tar_members(Path(tar.path), offset=tar.offset, size_bytes=tar.size_bytes):
            name = PurePosixPath(member.name).name
            if not name.startswith("."):
                byte_range = FileSpan(tar.path, member.offset, member.size_bytes)
                found.append(FoundImage(name, byte_range, f"{self._shown}{key}.tar/{member.name}"))
        if not found:
            raise DatasetError(
                f"'{key}.tar' contains no images",
                where=self.where,
                fix="download it again, or remove the class",
            )
        # Members of the released tars are in no order.
        return sorted(found, key=lambda image: (image.name, image.shown))

    def refuse_empty(self) -> None:
        """Refuse empty tars before packing starts, which may take hours.

        Raises:
            DatasetError: when one of them is empty.
        """
        # Only those of at most the size of an empty tar are opened: a `stat` per class instead of a walk.
        for key, tar in self._tars.items():
            size = Path(tar.path).stat().st_size if tar.size_bytes is None else tar.size_bytes
            if size <= _EMPTY_TAR_BYTES:
                self.images(key)


def tars_in_folder(folder: Path, root: Path) -> TarClasses:
    """The <wnid>.tar files of a folder; other files are ignored.

    Raises:
        DatasetError: when there are none, or some look like unfinished downloads.
    """
    names = visible_names(folder)
    # Ignoring them would silently leave out classes.
    unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
    if unfinished:
        raise DatasetError(
            f"{counted(len(unfinished), 'download looks', 'downloads look')} unfinished: {some(unfinished)}",
            where=folder,
            fix="finish the downloads, or remove these files",
        )
    tars = {match[1]: FileSpan(str(folder / name)) for name in names if (match := _CLASS_TAR.fullmatch(name))}
    if not tars:
        raise DatasetError("There are no <wnid>.tar files", where=folder, fix="put them into this folder")
    return TarClasses(tars, folder, shown_below(folder, root))


def tars_in_tar(path: Path, root: Path) -> TarClasses:
    """The <wnid>.tar members of a tar, found by its headers.

    Raises:
        DatasetError: when the tar is damaged or contains anything else.
    """
    tars, others = {}, []
    for member in safe_tar_members(path):
        name = PurePosixPath(member.name).name
        if match := _CLASS_TAR.fullmatch(name):
            if match[1] in tars:
                raise DatasetError(f"The archive has two '{name}'", where=path, fix="download it again")
            tars[match[1]] = FileSpan(str(path), member.offset, member.size_bytes)
        elif not name.startswith("."):
            others.append(member.name)
    if others or not tars:
        found = f"{counted(len(others), 'other file')}: {some(others)}" if others else "none"
        raise DatasetError(
            f"The archive should contain one <wnid>.tar per class, and contains {found}",
            where=path,
            fix=f"download the original {path.name} again, or unpack yours as train/<class>/<image>",
        )
    return TarClasses(tars, path, f"{shown_below(path.parent, root)}{path.name}/")


def has_class_tars(folder: Path) -> bool:
    """Whether a folder contains <wnid>.tar files."""
    return folder.is_dir() and any(_CLASS_TAR.fullmatch(name) for name in visible_names(folder))


def has_22k(root: Path) -> bool:
    """Whether any part of ImageNet-22K or of its archives exists."""
    names = [name for pair in _FOLDER_PAIRS for name in pair] + [*_TARS_OF_TARS, *_TAR_FOLDERS[:-1]]
    return (
        any((root / name).exists() for name in names)
        or _are_classes(root)
        or has_class_tars(root)
        or bool(_compressed(root))
    )


def read_22k(root: Path, dataset: str) -> ClassSource:
    """Read ImageNet-22K or ImageNet-21K-P in any format; folders take precedence over archives.

    Raises:
        DatasetError: when none is complete, as `source_of_folders` and `tars_in_tar`.
    """
    for train, val in _FOLDER_PAIRS:
        if has_subfolders(root / train):
            return source_of_folders(root, dataset, root / train, root / val)
        # Tars in train/ alone are the whole ImageNet-22K, found below; with val they are ImageNet-21K-P.
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
            f"{compressed[0]} must be unpacked first: a compressed tar cannot be read by byte range",
            where=root / compressed[0],
            fix=f"run: tar -xzf {compressed[0]}; the <wnid>.tar files inside stay as they are",
        )
    # A folder exists but has no classes: this raises the message that says what it should contain.
    return source_of_folders(root, dataset, root / "train", root / "val")


def _pair_of_tars(root: Path, dataset: str, train: Path, val: Path) -> ClassSource:
    """Train and val, each as one tar per class."""
    train_images, val_images = (tars_in_folder(folder, root) for folder in (train, val))
    require_same_classes(train_images, val_images)
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
            f"{counted(len(empty), 'class folder is', 'class folders are')} empty: {some(empty)}",
            where=train.where,
            fix="unpack their images, or remove the folders",
        )
    names = names_of(train.classes, read_synset_mapping(root))
    # The same images for both; `ClassSource.entries` divides them.
    parts: dict[str, ImagesByClass] = {"train": train, "val": train}
    return ClassSource(
        dataset, root, form, train.classes, parts, names, notes=(HELD_OUT_NOTE,), holds_out=True
    )


def _are_classes(folder: Path) -> bool:
    """Whether all folders in a folder are named by wnids."""
    return has_subfolders(folder) and all(
        WNID.fullmatch(name) for name in visible_names(folder) if (folder / name).is_dir()
    )


def _compressed(root: Path) -> list[str]:
    known: Iterable[str] = visible_names(root) if root.is_dir() else ()
    return [name for name in known if re.fullmatch(r"(fall11|winter21|imagenet21k).*\.(tar\.gz|tgz)", name)]


FORMAT = Form(lambda _: LAYOUT_22K, lambda root, _: has_22k(root), read_22k)
