"""ADE20K scene parsing (Zhou et al., CVPR 2017): the content of ADEChallengeData2016.zip, or that zip."""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
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
from vitpipe.datasets.layouts.image_headers import Look, labels_of, size_of

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
        # Both ways: a killed unpacking leaves either without the other.
        require_files([f"{name[:-4]}.png" for name in image_names], label_names, tree.where(labels), again)
        require_files([f"{name[:-4]}.jpg" for name in label_names], image_names, tree.where(images), again)
        if not image_names:
            raise DatasetError("There are no images", where=tree.where(images), fix=again)
        counts[f"{split}_images"] = len(image_names)
        files += [f"{images}/{name}" for name in image_names] + [f"{labels}/{name}" for name in label_names]
    # Part of the digest where they exist: the names of the classes come from the first.
    extra = [name for name in ("objectInfo150.txt", "sceneCategories.txt") if tree.is_file(name)]
    return DenseLayout(dataset, "ade20k", root, _classes(tree), counts, tuple(sorted(files + extra)), tree)


def look_into_ade20k(layout: DenseLayout, number: int | None) -> Look:
    """Compare label maps with their images (size) and with the class list, for `number` images or all."""
    images = [name for name in layout.files if name.startswith("images/")]
    looked = evenly_spaced(images, number)
    broken, wrong, high = [], [], []
    for name in looked:
        label_name = f"annotations/{name.removeprefix('images/')[:-4]}.png"
        size, labels = size_of(layout.tree, name), labels_of(layout.tree, label_name)
        if isinstance(size, str):
            broken.append(f"{name} ({size})")
        elif isinstance(labels, str):
            broken.append(f"{label_name} ({labels})")
        else:
            # Pillow has (width, height), numpy (height, width).
            if labels.shape != size[::-1]:
                wrong.append("{} ({}x{} instead of {}x{})".format(label_name, *labels.shape[::-1], *size))
            # Label 0 is "other", so the largest label equals the number of classes.
            if labels.size and labels.max() > len(layout.classes):
                high.append(f"{label_name} ({labels.max()})")
    problems = [
        (broken, "files cannot be decoded", "unpack ADEChallengeData2016.zip again"),
        (
            wrong,
            "label maps have another size than their images",
            "use images and label maps of the same release, and do not resize them",
        ),
        (
            high,
            f"label maps have labels above {len(layout.classes)}, the number of classes",
            "use the label maps of ADEChallengeData2016, not those of the full ADE20K with 3,000 classes",
        ),
    ]
    found = (
        DatasetError(f"{len(names)} {what}: {some(names)}", where=layout.root, fix=fix)
        for names, what, fix in problems
        if names
    )
    return Look(len(looked), tuple(found))


def _classes(tree: FileTree) -> tuple[str, ...]:
    """Class names from objectInfo150.txt, else the 150 of the challenge."""
    if not tree.is_file("objectInfo150.txt"):
        return class_names("ade20k")
    try:
        text = tree.read("objectInfo150.txt").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The list of classes is damaged ({error})",
            where=tree.where("objectInfo150.txt"),
            fix="unpack ADEChallengeData2016.zip again, or remove the file: its 150 names are built in",
        ) from error
    # Columns Idx, Ratio, Train, Val, Stuff, Name; a name is a list of synonyms, "wall" or "building,
    # edifice".
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    return tuple(row[-1].split(",")[0].strip() for row in rows)


LAYOUT = Layout(verify_ade20k, look_into_ade20k)
