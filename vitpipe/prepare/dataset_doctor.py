"""Examine datasets, raw or prepared, without changing anything: every finding names the fix.

raw        form and layout > counts, classes and their order beside the catalogue > released files > a
           sample of images decoded, or all of them
prepared   manifest, sizes and digests > checksums when asked for
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitpipe.config.data import DENSE_SETS, SHARD_SETS
from vitpipe.config.digest import digest_of
from vitpipe.contracts.errors import DatasetError, VitpipeError
from vitpipe.data.manifest import MANIFEST, DataManifest, ShardManifest, content_digest, read_manifest
from vitpipe.datasets.catalogue import class_names, facts
from vitpipe.datasets.layouts import LOOK_INTO, VERIFY_DENSE
from vitpipe.datasets.sources.class_listing import IMAGE_SUFFIXES
from vitpipe.datasets.sources.detect_format import find_source, folder_of
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare.examine_parallel import PackOptions, examined
from vitpipe.prepare.expectations import (
    Say,
    compare_archives,
    compare_classes,
    compare_counts,
    expected_of,
    name_short_classes,
)
from vitpipe.prepare.findings import DatasetReport, Finding, Level

__all__ = ["DatasetReport", "Finding", "Level", "examine"]

SAMPLE = 200
_NAMED = 5
_AGAIN = "run the prepare stage again, or copy the prepared folder anew"
_MINIATURE = (
    "get what is missing or remove what does not belong there; nothing to fix for a part or a stand-in"
)


def examine(
    root: Path,
    datasets: Sequence[str] | None = None,
    *,
    deep: bool = False,
    checksums: bool = False,
    say: Say = lambda text: None,
) -> list[DatasetReport]:
    """Examine the sets below a folder.

    Args:
        root: holds imagenet/, coco/, ... as users have them, or is a folder that the prepare stage made.
        datasets: names in the catalogue; all that are there if None.
        deep: decode every image, else `SAMPLE` per set.
        checksums: read archives or shards and compare checksums.
        say: told what takes long.

    Raises:
        DatasetError: when the folder does not exist, holds no dataset, or a name is unknown. What is wrong
            with a dataset itself is among the findings.
    """
    if not root.is_dir():
        raise DatasetError("The folder of the datasets does not exist", where=root, fix="name another folder")
    for name in datasets or ():
        facts(name)  # refuses an unknown name
    prepared = (root / MANIFEST).is_file()
    names = list(datasets or (_prepared_sets(root) if prepared else _present(root)))
    if not names:
        raise DatasetError(
            "The folder holds no dataset",
            where=root,
            fix="name the folder that holds imagenet/, coco/, cifar10/, ..., not the folder of one set",
        )
    reports = []
    for name in names:
        report = DatasetReport(name)
        say(f"examining {name}")
        try:
            if prepared:
                _examine_prepared(report, root, checksums=checksums)
            elif name in SHARD_SETS:
                _examine_source(report, root, deep=deep, checksums=checksums, say=say)
            else:
                _examine_layout(report, root, deep=deep, checksums=checksums, say=say)
        except VitpipeError as error:
            report.findings.append(Finding.of(error))
        except OSError as error:
            where, fix = error.filename or root / name, "make it readable for this user, or copy it anew"
            report.add("error", f"It cannot be read ({error.strerror or error})", where, fix)
        reports.append(report)
    return reports


def _present(root: Path) -> Iterator[str]:
    """Sets that have a folder of their own; DomainNet's domains may share one."""
    for name in (*SHARD_SETS, *DENSE_SETS):
        folder = root / name
        if not folder.is_dir() and name.startswith("domainnet_"):
            domain = name.removeprefix("domainnet_")
            folder = root / "domainnet"
            if not any((folder / part).exists() for part in (domain, f"{domain}.zip", f"{domain}_train.txt")):
                continue
        if folder.is_dir():
            yield name


def _examine_source(report: DatasetReport, root: Path, *, deep: bool, checksums: bool, say: Say) -> None:
    """A classification set in whatever form it lies there."""
    folder = folder_of(root, report.dataset)
    if folder.is_dir():
        compare_archives(report, folder, checksums=checksums, say=say)
    source = find_source(root, report.dataset)
    report.form, report.num_classes = source.form, len(source.classes)
    known, keys = expected_of(report.dataset, len(source.classes))
    for note in source.notes:
        report.add("note", note)
    counts, suffixes, sample = {}, _Examples(), _Sample(SAMPLE)
    for split in source.splits:
        per_class: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
        for entry in source.entries(split):
            per_class[source.classes[entry.label]] += 1
            if not entry.name.lower().endswith(IMAGE_SUFFIXES):
                suffixes.add(entry.shown)
            sample.add(entry)
        counts[split] = per_class
    report.num_train, report.num_val = (counts[split].total() for split in ("train", "val"))
    compare_counts(report, known, _MINIATURE)
    compare_classes(report, source.classes, keys, source.root)
    for split, per_class in counts.items():
        name_short_classes(report, split, per_class, known, source.root)
    if suffixes.number:
        fix = "remove them from the class folders, or data.max_corrupt_images must allow for them"
        report.add(
            "error", f"{suffixes.number:,} files are no images by their names: {suffixes}", source.root, fix
        )
    _decode(report, source, sample.entries, deep=deep)


def _decode(report: DatasetReport, source: Source, sample: Sequence[ImageEntry], *, deep: bool) -> None:
    """Decode images as packing does; all of them by several processes."""
    total = (report.num_train or 0) + (report.num_val or 0)
    workers = len(os.sched_getaffinity(0)) if deep and total > SAMPLE else 0
    everything = (entry for split in source.splits for entry in source.entries(split))
    broken, odd, number = _Examples(), Counter[str](), 0
    for entry, image in examined(everything if deep else iter(sample), PackOptions(1, workers=workers)):
        number += 1
        if image.treatment == "left out":
            broken.add(f"{entry.shown} ({image.finding})")
        elif image.finding:
            odd[image.finding] += 1
    if broken.number:
        fix = "replace them by good copies, or set data.max_corrupt_images to leave them out"
        report.add("error", f"{broken.number:,} images cannot be decoded: {broken}", source.root, fix)
    for finding, count in sorted(odd.items()):
        report.add("note", f"{count:,} of the images looked at: {finding}")
    _say_looked(report, number, total)


def _examine_layout(report: DatasetReport, root: Path, *, deep: bool, checksums: bool, say: Say) -> None:
    """A dense set in folders or in its original archives."""
    name = report.dataset
    if (root / name).is_dir():
        compare_archives(report, root / name, checksums=checksums, say=say)
    layout = VERIFY_DENSE[name](root / name)
    report.form, report.num_classes = layout.form, len(layout.classes)
    report.num_train, report.num_val = layout.counts["train_images"], layout.counts["val_images"]
    compare_counts(report, facts(name), _MINIATURE)
    for note in layout.notes:
        report.add("note", note)
    if set(layout.classes) == set(class_names(name)):
        compare_classes(report, layout.classes, class_names(name), layout.root)
    look = LOOK_INTO[name](layout, None if deep else SAMPLE)
    report.findings += [Finding.of(problem) for problem in look.problems]
    _say_looked(report, look.num_looked, report.num_train + report.num_val)


def _examine_prepared(report: DatasetReport, root: Path, *, checksums: bool) -> None:
    """One set of a folder that the prepare stage made."""
    from vitpipe.data.shards import open_shards, verify_checksums
    from vitpipe.datasets.dense_folder import check_dense

    name, whole = report.dataset, read_manifest(root, DataManifest)
    if report.dataset in DENSE_SETS:
        dense = check_dense(root, name, checksums=checksums)
        report.form = "packed" if dense.archive else f"folder {dense.root}"
        report.num_train, report.num_val = dense.counts["train_images"], dense.counts["val_images"]
        report.num_classes, digests = len(dense.classes), (dense.digest, content_digest(dense))
        num_bytes = dense.size_bytes
    else:
        shards = read_manifest(root / name, ShardManifest)
        report.form = f"shards of {shards.form}" if shards.form else "shards"
        numbers = {split: open_shards(root, name, split).manifest.num_images for split in shards.splits}
        report.num_train, report.num_val = numbers.get("train"), numbers.get("val")
        report.num_classes, digests = len(shards.classes), (shards.digest, content_digest(shards))
        num_bytes = sum(split.size_bytes for split in shards.splits.values())
        for finding, count in shards.findings.items():
            report.add("note", f"{count:,} images: {finding}", root / name)
        if checksums:
            verify_checksums(root, name)
    report.add("note", f"Checksums of {num_bytes:,} bytes {'agree' if checksums else 'were not compared'}")
    if len({*digests, whole.sets.get(name)}) > 1 or whole.data_digest != digest_of(whole.sets):
        report.add("error", "The digests of the manifests do not agree", root / MANIFEST, _AGAIN)
    if report.num_classes:
        compare_counts(report, expected_of(name, report.num_classes)[0], _MINIATURE)


def _prepared_sets(root: Path) -> tuple[str, ...]:
    return tuple(read_manifest(root, DataManifest).sets)


def _say_looked(report: DatasetReport, number: int, total: int) -> None:
    rest = "" if number >= total else "; --deep looks at all"
    report.add("note", f"{number:,} of {total:,} images were looked at{rest}")


class _Examples:
    """Counts, and remembers the first few for the message."""

    def __init__(self) -> None:
        self.number, self._named = 0, list[str]()

    def add(self, name: str) -> None:
        """Count one."""
        self.number += 1
        if self.number <= _NAMED:
            self._named.append(name)

    def __str__(self) -> str:
        more = f" and {self.number - _NAMED:,} more" if self.number > _NAMED else ""
        return f"{', '.join(self._named)}{more}"


class _Sample:
    """Evenly spread entries of a stream whose length is not known, at least `number` of them if there are."""

    def __init__(self, number: int) -> None:
        self.entries: list[ImageEntry] = []
        self._number, self._stride, self._position = number, 1, 0

    def add(self, entry: ImageEntry) -> None:
        """Offer the next one."""
        if self._position % self._stride == 0:
            self.entries.append(entry)
            if len(self.entries) == 2 * self._number:
                self.entries, self._stride = self.entries[::2], 2 * self._stride
        self._position += 1
