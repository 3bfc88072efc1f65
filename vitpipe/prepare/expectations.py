"""Compare a dataset with the catalogue: image counts, classes and their order, checksums of archives."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.contracts.errors import some
from vitpipe.contracts.graph import CLASSES
from vitpipe.contracts.units import counted
from vitpipe.datasets.catalogue import FACTS, Archive, DatasetFacts, class_order, facts
from vitpipe.prepare.findings import DatasetReport

Say = Callable[[str], None]
"""Receives progress messages."""
# Training images per class of ILSVRC 2012 (Russakovsky et al., IJCV 2015, section 3).
_IMAGENET_PER_CLASS = (732, 1300)
_IMAGENET = "imagenet"


def expected_of(dataset: str, num_classes: int) -> tuple[DatasetFacts, tuple[str, ...]]:
    """The published facts to compare with, and the class keys in order (empty if the folders define them).

    For a dataset with several releases, those of the release that has `num_classes` classes.
    """
    if dataset not in FACTS:  # the user's own
        return facts(dataset, DataConfig(own_sets={dataset: CLASSES})), ()
    known = facts(dataset)
    # ImageNet-22K has four releases, of 10,450 to 21,841 classes.
    for release in known.releases:
        if release.num_classes == num_classes:
            own = replace(
                known,
                title=f"{known.title}: {release.title}",
                num_train_images=release.num_train_images,
                num_val_images=release.num_val_images,
                num_classes=release.num_classes,
            )
            return own, class_order(dataset, release.name)
    return known, class_order(dataset)


def compare_counts(report: DatasetReport, known: DatasetFacts, fix: str) -> None:
    """Compare images per split and classes; adds one warning per difference. Nothing for an own set."""
    if not known.num_train_images:
        return
    found = {"train": report.num_train, "val": report.num_val}
    expected = {"train": known.num_train_images, "val": known.num_val_images}
    if known.num_val_images == 0 and None not in found.values():
        # The release has no validation split: the user held one out of train, so only the sum is known.
        found = {"train with val": (report.num_train or 0) + (report.num_val or 0)}
        expected = {"train with val": known.num_train_images}
    for split, number in found.items():
        if number is not None and number != expected[split]:
            difference = number - expected[split]
            more = f"{difference:,} more" if difference > 0 else f"{-difference:,} fewer"
            what = (
                f"{split} has {counted(number, 'image')}, {more} than the {expected[split]:,} of "
                f"{known.title}"
            )
            report.add("warning", what, fix=fix)
    if report.num_classes is not None and report.num_classes != known.num_classes:
        what = f"{counted(report.num_classes, 'class', 'classes')}, expected {known.num_classes:,}"
        report.add("warning", what, fix=fix)


def compare_classes(report: DatasetReport, classes: Sequence[str], known: Sequence[str], where: Path) -> None:
    """Compare class keys and their order with the canonical ones; adds at most one finding."""
    if not known or tuple(classes) == tuple(known):
        return
    unknown, missing = sorted(set(classes) - set(known)), sorted(set(known) - set(classes))
    numbered = all(name.isdecimal() for name in classes)
    # Folders 0 to 999; sorted as text, number 10 comes before number 2.
    if report.dataset.startswith("imagenet") and numbered:
        sort = (
            "sorted as text (0, 1, 10, 100, ...)"
            if list(classes) != sorted(classes, key=int)
            else "not wnids"
        )
        report.add(
            "error",
            f"The class folders are named by numbers, {sort}: labels will differ from ImageNet's",
            where,
            "rename each folder to its wnid, for example 0 to n01440764; devkit and timm list them in order",
        )
    elif not unknown and not missing:
        first = next(n for n, (a, b) in enumerate(zip(classes, known, strict=True)) if a != b)
        report.add(
            "warning",
            f"The classes are in another order: label {first} is '{classes[first]}' here and "
            f"'{known[first]}' in the release",
            where,
            "use the original archives to evaluate published classifiers; own training needs no change",
        )
    elif len(unknown) == len(classes):
        # Only a warning: small substitute datasets in the layout of ImageNet are used for trials.
        what = f"None of the {len(classes)} classes belongs to {report.dataset}: {some(unknown)}"
        report.add(
            "warning",
            what,
            where,
            "name the classes as the release does, unless this is a substitute dataset",
        )
    elif unknown:
        report.add(
            "error",
            f"{counted(len(unknown), 'class does', 'classes do')} not belong to {report.dataset}: "
            f"{some(unknown)}" + (f"; missing are {some(missing)}" if missing else ""),
            where,
            "rename or remove these folders: each one shifts the labels of all classes after it",
        )
    else:
        what = (
            f"{len(missing)} of the {len(known):,} classes {'is' if len(missing) == 1 else 'are'} "
            f"missing: {some(missing)}"
        )
        report.add("warning", what, where, "add them, or do not compare with results on the whole dataset")


def name_short_classes(
    report: DatasetReport, split: str, per_class: Counter[str], known: DatasetFacts, where: Path
) -> None:
    """List classes with too few or too many images, if the release's number per class is known."""
    # With other classes, `compare_classes` has the finding already; of an own set nothing is known.
    if len(per_class) != known.num_classes or not known.num_classes:
        return
    num_images = known.num_train_images if split == "train" else known.num_val_images
    even, rest = divmod(num_images, known.num_classes)
    # A total that divides evenly means a balanced split (ImageNet val, CIFAR); otherwise no range is known.
    low, high = (even, even) if not rest else (0, num_images)
    if split == "train" and _IMAGENET in (known.name, known.classes_of):
        low, high = _IMAGENET_PER_CLASS
    odd = [f"{name} ({number})" for name, number in per_class.items() if not low <= number <= high]
    # If half of all classes differ, it is another release or a subset, which `compare_counts` reports.
    if odd and len(odd) < known.num_classes // 2:
        span = f"{low}" if low == high else f"{low} to {high}"
        what = (
            f"{counted(len(odd), 'class', 'classes')} of {split} without {span} images as in the "
            f"release: {some(odd)}"
        )
        report.add("warning", what, where, "unpack these classes again from the original archives")


def compare_archives(report: DatasetReport, root: Path, *, checksums: bool, say: Say) -> None:
    """Compare released archives in the dataset's folder: sizes, and checksums if `checksums`."""
    known, _ = expected_of(report.dataset, 0)
    # `parts` are members of an archive with their own checksums: they may be unpacked to subfolders.
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if known.parts else [root]
    for archive in known.every_archive:
        for path in (folder / archive.file for folder in folders):
            if path.is_file():
                _compare_archive(report, path, archive, checksums=checksums, say=say)


def _compare_archive(
    report: DatasetReport, path: Path, archive: Archive, *, checksums: bool, say: Say
) -> None:
    size = path.stat().st_size
    fix = "download it again, unless it was repacked on purpose; a truncated download is shorter"
    if archive.size_bytes is not None and size != archive.size_bytes:
        report.add(
            "warning", f"The archive has {size:,} bytes, the released one {archive.size_bytes:,}", path, fix
        )
    if not checksums:
        return
    if archive.checksum is None or archive.algorithm is None:
        report.add("note", "No checksum of this archive is published", path)
        return
    say(f"reading {path} ({size:,} bytes)")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, archive.algorithm).hexdigest()
    if found != archive.checksum:
        what = f"The {archive.algorithm} is {found}, the published one {archive.checksum} ({archive.source})"
        report.add("error", what, path, "download it again from its official URL")
    else:
        report.add("note", f"The {archive.algorithm} equals the published one", path)
