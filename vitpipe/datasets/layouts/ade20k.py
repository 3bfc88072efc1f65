"""ADE20K scene parsing (Zhou et al., CVPR 2017): the content of ADEChallengeData2016.zip, or that zip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.catalogue import class_names
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
from vitpipe.datasets.layouts.image_headers import Look, label_maps_of, sizes_of

_CLASSES = "objectInfo150.txt"
_IGNORED = 255  # mmseg's value for pixels that neither losses nor metrics count
_FOLDERS = {"train": "training", "val": "validation"}
_PUT = "put ADEChallengeData2016.zip into the set's folder, or images/ and annotations/ from inside it"
ARCHIVES = (
    OriginalArchive("ADEChallengeData2016.zip", ("images", "annotations"), strip="ADEChallengeData2016/"),
)


def verify_ade20k(root: Path, dataset: str = "ade20k") -> DenseLayout:
    """Verify an ADEChallengeData2016 folder: images/ and annotations/, each with training/ and validation/.

    Raises:
        DatasetError: a missing folder, an image without label map or a label map without image, an
        archive that
            is refused.
    """
    root, tree = open_tree(root, dataset, ARCHIVES)
    counts: dict[str, int] = {}
    files: list[str] = []
    for split, folder in _FOLDERS.items():
        images, labels = f"images/{folder}", f"annotations/{folder}"
        for name in (images, labels):
            require_folder(tree, name, dataset, _PUT)
        image_names, label_names = tree.names(images, ".jpg"), tree.names(labels, ".png")
        again = "unpack ADEChallengeData2016.zip again"
        if not image_names:
            others = tree.names(images)
            found = f", but {counted(len(others), 'other file')}: {some(others, 2)}" if others else ""
            raise DatasetError(
                f"There are no images NAME.jpg{found}",
                where=tree.where(images),
                fix=f"{again}, or save the images as JPEG with the ending .jpg, in small letters",
            )
        # Both ways: a killed unpacking leaves either without the other.
        require_files([f"{name[:-4]}.png" for name in image_names], label_names, tree.where(labels), again)
        require_files([f"{name[:-4]}.jpg" for name in label_names], image_names, tree.where(images), again)
        counts[f"{split}_images"] = len(image_names)
        files += [f"{images}/{name}" for name in image_names] + [f"{labels}/{name}" for name in label_names]
    # Part of the digest where they exist: the names of the classes come from the first.
    extra = [name for name in (_CLASSES, "sceneCategories.txt") if tree.is_file(name)]
    return DenseLayout(dataset, "ade20k", root, _classes(tree), counts, tuple(sorted(files + extra)), tree)


def look_into_ade20k(layout: DenseLayout, number: int | None) -> Look:
    """Compare label maps with their images (size) and with the class list, for `number` images or all."""
    images = [name for name in layout.files if name.startswith("images/")]
    looked = evenly_spaced(images, number)
    label_names = [f"annotations/{name.removeprefix('images/')[:-4]}.png" for name in looked]
    broken, wrong, high = [], [], []
    values: dict[str, set[int]] = {folder: set() for folder in _FOLDERS.values()}
    num_classes = len(layout.classes)
    pairs = zip(sizes_of(layout.tree, looked), label_maps_of(layout.tree, label_names), strict=True)
    for name, label_name, (size, labels) in zip(looked, label_names, pairs, strict=True):
        if isinstance(size, str):
            broken.append(f"{name} ({size})")
        elif isinstance(labels, str):
            broken.append(f"{label_name} ({labels})")
        else:
            if labels.size != size:
                wrong.append("{} ({}x{} instead of {}x{})".format(label_name, *labels.size, *size))
            # Label 0 is "other", so the largest label equals the number of classes.
            if odd := [
                value for value in labels.values if not (0 <= value <= num_classes or value == _IGNORED)
            ]:
                high.append(f"{label_name} ({odd[-1]})")
            values[name.split("/")[1]].update(labels.values)
    problems = [
        (
            broken,
            "files cannot be used",
            "unpack ADEChallengeData2016.zip again, with one-channel label maps",
        ),
        (
            wrong,
            "label maps have another size than their images",
            "use images and label maps of the same release, and do not resize them",
        ),
        (
            high,
            f"label maps have labels above {num_classes}, the number of classes",
            "use the label maps of ADEChallengeData2016, not those of the full ADE20K with 3,000 classes, "
            f"and a {_CLASSES} with a line per class",
        ),
    ]
    found = [
        DatasetError(f"{len(names)} {what}: {some(names)}", where=layout.root, fix=fix)
        for names, what, fix in problems
        if names
    ]
    # What no single map shows, and a sample of them does not either.
    if not found and len(looked) == len(images):
        found += _numbering_problems(layout, values)
    return Look(len(looked), tuple(found))


def _numbering_problems(layout: DenseLayout, values: dict[str, set[int]]) -> Iterator[DatasetError]:
    """Label maps without labels, and maps whose classes count from 0 with 255 for "other"."""
    num_classes = len(layout.classes)
    for folder, found in values.items():
        where = layout.tree.where(f"annotations/{folder}")
        if found <= {0, _IGNORED}:
            yield DatasetError(
                "No label map has a labelled pixel: all are 0 (other) or 255 (ignored)",
                where=where,
                fix="use the label maps of ADEChallengeData2016",
            )
            return
    everything = set[int]().union(*values.values())
    # Counted from 1, the last class is number `num_classes`, and 0 is what has no class: 255 is not needed.
    counts_from_zero = {0, _IGNORED} <= everything or everything >= set(range(num_classes))
    if num_classes not in everything and counts_from_zero:
        yield DatasetError(
            f"The label maps seem to count classes from 0: {num_classes}, the last class, never occurs, "
            "0 does" + (", and 255 stands for what has no class" if _IGNORED in everything else ""),
            where=layout.tree.where("annotations"),
            fix="add 1 to every label but 255, so that 0 is what has no class, as in ADEChallengeData2016; "
            f"if they are right and the last class does not occur, take it out of {_CLASSES}",
        )


def _classes(tree: FileTree) -> tuple[str, ...]:
    """Class names from objectInfo150.txt, else the 150 of the challenge."""
    if not tree.is_file(_CLASSES):
        return class_names("ade20k")
    try:
        text = tree.read(_CLASSES).decode("utf-8-sig")  # Windows writes a byte order mark
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The list of classes is damaged ({error})",
            where=tree.where(_CLASSES),
            fix="unpack ADEChallengeData2016.zip again, or remove the file: its 150 names are built in",
        ) from error
    # Columns Idx, Ratio, Train, Val, Stuff, Name; a name is a list of synonyms, "wall" or "building,
    # edifice".
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    if not rows:
        raise DatasetError(
            "The list of classes is empty",
            where=tree.where(_CLASSES),
            fix="write a heading and a line per class, or remove the file: ADE20K's 150 names are built in",
        )
    return tuple(row[-1].split(",")[0].strip() for row in rows)


def pictures_of_ade20k(files: Sequence[str], split: str, read: Callable[[str], bytes]) -> list[str]:
    """The pictures of a split, see `Layout.pictures`."""
    return [name for name in files if name.startswith(f"images/{_FOLDERS[split]}/")]


LAYOUT = Layout(verify_ade20k, look_into_ade20k, pictures_of_ade20k)
