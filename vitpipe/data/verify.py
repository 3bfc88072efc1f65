"""Is a user's folder the dataset that it says it is? Every refusal names the mend. Nothing is changed.

Looks at names and annotations only, so it takes seconds; that images decode is checked while packing.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.data.catalogue import class_names
from vitpipe.errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SYNSET_NAMES = "LOC_synset_mapping.txt"
# ImageNet-22K has no validation set; one image in this many is kept out of training to measure on.
HELD_OUT_ONE_IN = 200
_NAMED = 5


@dataclass(frozen=True)
class ClassFolders:
    """A classification set as class folders: `folders[split]/<class>/<image>`.

    Attributes:
        classes: folder names, sorted: the class order.
        has_held_out_val: val is a fixed share of the train folder, chosen by file name.
    """

    dataset: str
    root: Path
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    folders: dict[str, Path]
    has_held_out_val: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.folders)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results should know about the splits."""
        if not self.has_held_out_val:
            return ()
        return (f"val is one in {HELD_OUT_ONE_IN} images of train, chosen by name and kept out of training",)

    def files(self, split: str) -> Iterator[tuple[int, Path]]:
        """(class number, file) in class order, then by name; hidden files are passed over."""
        for label, name in enumerate(self.classes):
            for file in _entries(self.folders[split] / name):
                chosen = zlib.crc32(file.name.encode()) % HELD_OUT_ONE_IN == 0
                if not self.has_held_out_val or chosen == (split == "val"):
                    yield label, file


@dataclass(frozen=True)
class DenseLayout:
    """A dense set in its own layout.

    Attributes:
        counts: numbers of pictures, annotations, sequences.
        files: every file that belongs to it, relative to root, sorted.
    """

    dataset: str
    root: Path
    classes: tuple[str, ...]
    counts: dict[str, int]
    files: tuple[str, ...]


def verify_class_folders(root: Path, dataset: str) -> ClassFolders:
    """Check an ImageNet-like folder: train/<class>/*, val/<class>/*.

    Raises:
        DatasetError: missing folder, images not in class folders, no classes, an empty class, or
            train and val with different classes.
    """
    _need_folder(
        root, dataset, f"put the set there as train/<class>/<image>, or take '{dataset}' out of data.sets"
    )
    train, val = root / "train", root / "val"
    _need_folder(train, dataset, "make it hold one folder of images per class")
    classes = _class_names_of(train)
    held_out = dataset == "imagenet22k" and not val.exists()
    if not held_out:
        _need_folder(val, dataset, "make it hold the same class folders as train/")
        found = _class_names_of(val)
        if found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise DatasetError(
                f"train/ and val/ have different classes, for example {_some(odd)}",
                where=root,
                mend="class numbers come from the sorted folder names: make both hold the same folders",
            )
    for folder in [train] if held_out else [train, val]:
        empty = [name for name in classes if next(_entries(folder / name), None) is None]
        if empty:
            raise DatasetError(
                f"{len(empty)} class folders are empty: {_some(empty)}",
                where=folder,
                mend="unpack their images, or remove the folders from train/ and val/",
            )
    names = _read_synset_names(root / SYNSET_NAMES, classes)
    folders = {"train": train, "val": train if held_out else val}
    return ClassFolders(dataset, root, classes, names, folders, held_out)


def verify_coco(root: Path) -> DenseLayout:
    """Check a COCO 2017 folder: train2017/, val2017/, annotations/instances_{train,val}2017.json.

    Raises:
        DatasetError: a missing folder or file, damaged JSON, images or categories that annotations
            name and that are not there.
    """
    _need_folder(
        root, "coco", "put train2017/, val2017/ and annotations/ there, or take 'coco' out of data.sets"
    )
    counts: dict[str, int] = {}
    files: list[str] = []
    classes: tuple[str, ...] = ()
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = _read_coco(path)
        found = tuple(category["name"] for category in content["categories"])
        if classes and found != classes:
            raise DatasetError(
                "The train and val annotations have different categories",
                where=path,
                mend="take both files from the same annotations_trainval2017.zip",
            )
        classes = found
        folder = root / f"{split}2017"
        _need_folder(folder, "coco", f"unpack {split}2017.zip there")
        present = set(_names(folder))
        wanted = [image["file_name"] for image in content["images"]]
        _none_missing(wanted, present, folder, f"unpack {split}2017.zip completely")
        _check_references(content, path)
        counts[f"{split}_images"], counts[f"{split}_annotations"] = len(wanted), len(content["annotations"])
        files += [f"annotations/{path.name}", *(f"{split}2017/{name}" for name in wanted)]
    return DenseLayout("coco", root, classes, counts, tuple(sorted(files)))


def verify_ade20k(root: Path) -> DenseLayout:
    """Check an ADEChallengeData2016 folder: images/ and annotations/, each training/ and validation/.

    Raises:
        DatasetError: a missing folder, a picture without label map or a label map without picture.
    """
    _need_folder(
        root, "ade20k", "put the content of ADEChallengeData2016.zip there, or take 'ade20k' out of data.sets"
    )
    counts: dict[str, int] = {}
    files: list[str] = []
    for split, folder in (("train", "training"), ("val", "validation")):
        images, labels = root / "images" / folder, root / "annotations" / folder
        for place in (images, labels):
            _need_folder(
                place, "ade20k", "the set lies as ADEChallengeData2016/images and /annotations; move both up"
            )
        image_names, label_names = _names(images, ".jpg"), _names(labels, ".png")
        stems = {name[:-4] for name in image_names}
        _none_missing(
            [f"{stem}.png" for stem in sorted(stems)], set(label_names), labels, "unpack the set again"
        )
        _none_missing(
            [f"{name[:-4]}.jpg" for name in label_names], set(image_names), images, "unpack the set again"
        )
        if not image_names:
            raise DatasetError(
                "There are no pictures", where=images, mend="unpack ADEChallengeData2016.zip again"
            )
        counts[f"{split}_images"] = len(image_names)
        files += [f"images/{folder}/{name}" for name in image_names]
        files += [f"annotations/{folder}/{name}" for name in label_names]
    extra = [name for name in ("objectInfo150.txt", "sceneCategories.txt") if (root / name).is_file()]
    return DenseLayout("ade20k", root, _ade_classes(root), counts, tuple(sorted(files + extra)))


def verify_davis(root: Path) -> DenseLayout:
    """Check a DAVIS 2017 folder at 480p.

    Raises:
        DatasetError: a missing folder or list, a listed sequence without frames or label maps.
    """
    _need_folder(root, "davis", "unpack DAVIS-2017-trainval-480p.zip there, or take 'davis' out of data.sets")
    counts: dict[str, int] = {}
    files: list[str] = []
    for split in ("train", "val"):
        listing = root / "ImageSets" / "2017" / f"{split}.txt"
        if not listing.is_file():
            raise DatasetError(
                "The list of sequences is missing",
                where=listing,
                mend="unpack DAVIS-2017-trainval-480p.zip again",
            )
        sequences = listing.read_text(encoding="utf-8").split()
        num_frames = 0
        for name in sequences:
            frames, labels = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
            for place in (frames, labels):
                _need_folder(place, "davis", f"unpack it, or remove '{name}' from {listing.name}")
            frame_names = _names(frames, ".jpg")
            label_names = [f"{frame[:-4]}.png" for frame in frame_names]
            _none_missing(
                label_names, set(_names(labels)), labels, "unpack DAVIS-2017-trainval-480p.zip again"
            )
            num_frames += len(frame_names)
            files += [f"JPEGImages/480p/{name}/{frame}" for frame in frame_names]
            files += [f"Annotations/480p/{name}/{label}" for label in label_names]
        counts[f"{split}_sequences"], counts[f"{split}_images"] = len(sequences), num_frames
        files.append(f"ImageSets/2017/{split}.txt")
    return DenseLayout("davis", root, (), counts, tuple(sorted(files)))


VERIFY_DENSE = {"coco": verify_coco, "ade20k": verify_ade20k, "davis": verify_davis}


def _class_names_of(folder: Path) -> tuple[str, ...]:
    entries = list(_entries(folder))
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    loose = [entry.name for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise DatasetError(
            f"{len(loose)} images lie directly in '{folder.name}', not in class folders: {_some(loose)}",
            where=folder,
            mend="move each image into the folder of its class; for ImageNet's val the classes are in "
            "ILSVRC2012_validation_ground_truth.txt of the devkit",
        )
    if not classes:
        raise DatasetError(
            "There are no class folders", where=folder, mend="unpack the set as <class>/<image>"
        )
    return classes


def _read_coco(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetError(
            "The annotations are missing", where=path, mend="unpack annotations_trainval2017.zip"
        )
    try:
        content = json.loads(path.read_bytes())
        return {key: content[key] for key in ("images", "annotations", "categories")}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"The annotations are damaged ({type(error).__name__}: {error})",
            where=path,
            mend="unpack annotations_trainval2017.zip again",
        ) from error


def _check_references(content: dict[str, Any], path: Path) -> None:
    """Every annotation must belong to a listed image and category."""
    for key, listed in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[listed]}
        unknown = sorted({a[key] for a in content["annotations"]} - known)
        if unknown:
            raise DatasetError(
                f"Annotations name {len(unknown)} {listed} that are not listed, for example {unknown[0]}",
                where=path,
                mend="take the annotations and the images of the same release",
            )


def _ade_classes(root: Path) -> tuple[str, ...]:
    """Class names from objectInfo150.txt, else the 150 of the challenge."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return class_names("ade20k")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return tuple(row[-1].split(",")[0].strip() for row in rows)


def _read_synset_names(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names for people from Kaggle's mapping file, when it is there and complete."""
    if not path.is_file():
        return ()
    pairs = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    names = {wnid: name.strip() for wnid, _, name in pairs}
    return tuple(names[wnid] for wnid in classes) if set(classes) <= set(names) else ()


def _entries(folder: Path) -> Iterator[Path]:
    """The folder's entries by name, without hidden ones."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return (folder / name for name in names)


def _names(folder: Path, suffix: str = "") -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.name.endswith(suffix)]


def _need_folder(folder: Path, dataset: str, mend: str) -> None:
    if not folder.is_dir():
        raise DatasetError(f"A folder of the dataset '{dataset}' is missing", where=folder, mend=mend)


def _none_missing(wanted: Iterable[str], present: set[str], folder: Path, mend: str) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DatasetError(f"{len(missing)} files are missing: {_some(missing)}", where=folder, mend=mend)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
