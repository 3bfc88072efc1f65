"""Classes of ImageNet's validation images, which are released flat: from the devkit or from Kaggle's list.

The devkit's meta.mat numbers the 1000 classes in its own order (ILSVRC2012_ID 1 to 1000; higher numbers
are inner nodes of WordNet), and ILSVRC2012_validation_ground_truth.txt has one such number per line, in
the order of the file names.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import safe_tar_stream
from vitpipe.datasets.sources.class_listing import FoundImage, ListedImages, first_existing
from vitpipe.datasets.sources.matlab import read_mat
from vitpipe.datasets.sources.synsets import WNID, read_synset_mapping

DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_DEVKIT_AGAIN = f"download {DEVKIT}.tar.gz again"


@dataclass(frozen=True)
class ValLabels:
    """The class of every validation image.

    Attributes:
        wnids: wnid by file name without extension.
        class_names: readable name by wnid; may be empty.
        where: the file they were read from.
    """

    wnids: dict[str, str]
    class_names: dict[str, str]
    where: Path

    @property
    def classes(self) -> set[str]:
        """All classes that occur."""
        return set(self.wnids.values())


def find_val_labels(root: Path) -> ValLabels | None:
    """Labels from Kaggle's list or from the devkit (archive or unpacked); None when neither exists.

    Raises:
        DatasetError: when it is damaged or inconsistent.
    """
    if solution := first_existing(root / SOLUTION, root / "ILSVRC" / SOLUTION):
        return _read_solution(solution, read_synset_mapping(root, root / "ILSVRC"))
    # As unpacked, without its top folder, or renamed.
    unpacked = (root / DEVKIT / "data", root / "data", root / "devkit" / "data")
    if folder := next((folder for folder in unpacked if (folder / GROUND_TRUTH).is_file()), None):
        files = {
            path.name: path.read_bytes() for path in (folder / _META, folder / GROUND_TRUTH) if path.is_file()
        }
        return _read_devkit(files, folder)
    # A browser that decompresses on download leaves a .tar.
    if archive := first_existing(root / f"{DEVKIT}.tar.gz", root / f"{DEVKIT}.tar"):
        members = ((PurePosixPath(name).name, content) for name, content in safe_tar_stream(archive))
        files = {name: content for name, content in members if name in (_META, GROUND_TRUTH)}
        return _read_devkit(files, archive)
    return None


def label_images(images: list[FoundImage], labels: ValLabels, where: Path) -> ListedImages:
    """Assign each image to its class.

    Raises:
        DatasetError: unless images and labels have the same file names.
    """
    # By stem: Kaggle's list has no extensions.
    stems = {PurePosixPath(image.name).stem for image in images}
    missing, extra = sorted(labels.wnids.keys() - stems), sorted(stems - labels.wnids.keys())
    if missing or extra:
        parts = (
            [f"{counted(len(missing), 'image is', 'images are')} missing ({some(missing)})"]
            if missing
            else []
        )
        parts += (
            [f"{counted(len(extra), 'image has', 'images have')} no label ({some(extra)})"] if extra else []
        )
        raise DatasetError(
            f"{labels.where.name} has labels of {counted(len(labels.wnids), 'image')} and "
            f"{len(images)} were found: " + "; ".join(parts),
            where=where,
            fix="unpack or download ILSVRC2012_img_val.tar again; it starts at ILSVRC2012_val_00000001.JPEG",
        )
    labelled = ((labels.wnids[PurePosixPath(image.name).stem], image) for image in images)
    return ListedImages(labelled, where)


def _read_solution(path: Path, class_names: dict[str, str]) -> ValLabels:
    """Kaggle's LOC_val_solution.csv: `ImageId,PredictionString`."""
    wnids: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header[:2] != ["ImageId", "PredictionString"]:
            raise DatasetError(
                "The first line is not 'ImageId,PredictionString'",
                where=path,
                fix=f"download {SOLUTION} again",
            )
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            # "n03995372 85 1 499 272 n03995372 ...": one wnid and box per object, all of the same class.
            wnid = row[1].split(" ")[0] if len(row) > 1 else ""
            if not WNID.fullmatch(wnid) or row[0] in wnids or (class_names and wnid not in class_names):
                raise DatasetError(
                    f"Line {number} gives '{row[0]}' the class '{wnid}', which is unknown or its second one",
                    where=path,
                    fix=f"download {SOLUTION} and LOC_synset_mapping.txt again, from the same competition",
                )
            wnids[row[0]] = wnid
    return ValLabels(wnids, class_names, path)


def _read_devkit(files: dict[str, bytes], where: Path) -> ValLabels:
    for name in (_META, GROUND_TRUTH):
        if name not in files:
            raise DatasetError(f"The devkit lacks data/{name}", where=where, fix=_DEVKIT_AGAIN)
    class_of, class_names = _read_meta(files[_META], where / _META)
    wnids = {}
    for number, line in enumerate(files[GROUND_TRUTH].decode("ascii", errors="replace").split(), start=1):
        if line not in class_of:
            raise DatasetError(
                f"Line {number} of {GROUND_TRUTH} is '{line}'; meta.mat has the classes 1 to {len(class_of)}",
                where=where,
                fix=_DEVKIT_AGAIN + ": both files must be of ILSVRC2012",
            )
        # Line n belongs to the n-th file name in ascending order (readme.txt of the devkit).
        wnids[f"ILSVRC2012_val_{number:08d}"] = class_of[line]
    return ValLabels(wnids, class_names, where)


def _read_meta(content: bytes, where: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Wnid by ILSVRC2012_ID (as text), and name by wnid, of the leaves."""
    synsets = read_mat(content, ("synsets",), where)["synsets"]
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    if not set(fields) <= set(synsets.dtype.names or ()):
        raise DatasetError(
            f"meta.mat has no 'synsets' with the fields {', '.join(fields)}", where=where, fix=_DEVKIT_AGAIN
        )
    class_of, class_names = {}, {}
    for record in np.ravel(synsets):
        number, wnid, words, num_children = (np.ravel(record[name]) for name in fields)
        # MATLAB numbers are doubles. Inner nodes have children, and ids above 1000 that no image carries.
        if int(num_children[0]) == 0:
            class_of[str(int(number[0]))] = str(wnid[0])
            class_names[str(wnid[0])] = str(words[0])
    if len(class_names) != len(class_of) or not all(WNID.fullmatch(wnid) for wnid in class_names):
        raise DatasetError("meta.mat has duplicate or invalid wnids", where=where, fix=_DEVKIT_AGAIN)
    return class_of, class_names
