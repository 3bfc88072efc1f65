"""A set as it was found, beside what the catalogue knows: counts, classes and their order, released files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vitpipe.contracts.errors import some
from vitpipe.datasets.catalogue import Archive, DatasetFacts, class_order, facts
from vitpipe.prepare.findings import DatasetReport

Say = Callable[[str], None]
# Training images per class of ILSVRC 2012 (Russakovsky et al., IJCV 2015, section 3).
_IMAGENET_PER_CLASS = (732, 1300)
_IMAGENET = ("imagenet", "imagenet100", "imagenet10")


def expected_of(dataset: str, num_classes: int) -> tuple[DatasetFacts, tuple[str, ...]]:
    """The facts to compare with, and the class keys in order (empty where the folders decide).

    Of a set with several releases, those of the release that has so many classes.
    """
    known = facts(dataset)
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
    """Number of images per split and of classes; one warning each, whatever the difference."""
    found = {"train": report.num_train, "val": report.num_val}
    expected = {"train": known.num_train_images, "val": known.num_val_images}
    if known.num_val_images == 0 and None not in found.values():
        # The release has no val: it was held out of train, or comes from elsewhere.
        found = {"train with val": (report.num_train or 0) + (report.num_val or 0)}
        expected = {"train with val": known.num_train_images}
    for split, number in found.items():
        if number is not None and number != expected[split]:
            difference = number - expected[split]
            more = f"{difference:,} more" if difference > 0 else f"{-difference:,} fewer"
            what = f"{split} has {number:,} images, {more} than the {expected[split]:,} of {known.title}"
            report.add("warning", what, fix=fix)
    if report.num_classes is not None and report.num_classes != known.num_classes:
        what = f"There are {report.num_classes:,} classes instead of {known.num_classes:,}"
        report.add("warning", what, fix=fix)


def compare_classes(report: DatasetReport, classes: Sequence[str], known: Sequence[str], where: Path) -> None:
    """Class keys and their order against the canonical ones."""
    if not known or tuple(classes) == tuple(known):
        return
    unknown, missing = sorted(set(classes) - set(known)), sorted(set(known) - set(classes))
    numbered = all(name.isdecimal() for name in classes)
    if report.dataset.startswith("imagenet") and numbered:
        sort = (
            "sorted as text (0, 1, 10, 100, ...)"
            if list(classes) != sorted(classes, key=int)
            else "not wnids"
        )
        report.add(
            "error",
            f"The class folders are named by numbers, {sort}: class numbers will not be ImageNet's",
            where,
            "rename each folder to its wnid, for example 0 to n01440764; devkit and timm list them in order",
        )
    elif not unknown and not missing:
        first = next(n for n, (a, b) in enumerate(zip(classes, known, strict=True)) if a != b)
        report.add(
            "warning",
            f"The classes are in another order: number {first} is '{classes[first]}' here and "
            f"'{known[first]}' in the release",
            where,
            "nothing to fix for training from here on; classifiers of others need the release's order, "
            "which the original archives have",
        )
    elif len(unknown) == len(classes):
        what = f"None of the {len(classes)} classes is one of {report.dataset}'s: {some(unknown)}"
        report.add(
            "warning", what, where, "nothing for a stand-in; else name the classes as the release does"
        )
    elif unknown:
        report.add(
            "error",
            f"{len(unknown)} classes are none of {report.dataset}'s: {some(unknown)}"
            + (f"; missing are {some(missing)}" if missing else ""),
            where,
            "rename or remove these folders: each moves the numbers of all classes behind it",
        )
    else:
        what = f"{len(missing)} of the {len(known):,} classes are missing: {some(missing)}"
        report.add("warning", what, where, "get them too, or do not compare with results on the whole set")


def name_short_classes(
    report: DatasetReport, split: str, per_class: Counter[str], known: DatasetFacts, where: Path
) -> None:
    """Say which classes have too few or too many images, where the release's number per class is known."""
    if len(per_class) != known.num_classes:
        return
    num_images = known.num_train_images if split == "train" else known.num_val_images
    even, rest = divmod(num_images, known.num_classes)
    low, high = (even, even) if not rest else (0, num_images)
    if split == "train" and report.dataset in _IMAGENET:
        low, high = _IMAGENET_PER_CLASS
    odd = [f"{name} ({number})" for name, number in per_class.items() if not low <= number <= high]
    if odd and len(odd) < known.num_classes // 2:
        span = f"{low}" if low == high else f"{low} to {high}"
        what = f"{len(odd)} classes of {split} have not {span} images as in the release: {some(odd)}"
        report.add("warning", what, where, "unpack these classes again from the original archives")


def compare_archives(report: DatasetReport, root: Path, *, checksums: bool, say: Say) -> None:
    """Released files that lie in the set's folder: sizes, and checksums when asked for."""
    known = facts(report.dataset)
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if known.parts else [root]
    for archive in known.every_archive:
        for path in (folder / archive.file for folder in folders):
            if path.is_file():
                _compare_archive(report, path, archive, checksums=checksums, say=say)


def _compare_archive(
    report: DatasetReport, path: Path, archive: Archive, *, checksums: bool, say: Say
) -> None:
    size = path.stat().st_size
    fix = "get it again if it is meant to be the original; a truncated download is shorter"
    if archive.size_bytes is not None and size != archive.size_bytes:
        report.add("warning", f"It has {size:,} bytes, the release has {archive.size_bytes:,}", path, fix)
    if not checksums:
        return
    if archive.checksum is None or archive.algorithm is None:
        report.add("note", "No checksum of it was published", path)
        return
    say(f"reading {path} ({size:,} bytes)")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, archive.algorithm).hexdigest()
    if found != archive.checksum:
        what = f"Its {archive.algorithm} is {found}, published is {archive.checksum} ({archive.source})"
        report.add("error", what, path, "get it again from its official address")
    else:
        report.add("note", f"Its {archive.algorithm} is the published one", path)
