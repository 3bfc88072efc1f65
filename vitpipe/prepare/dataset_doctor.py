"""Examine raw or prepared datasets, read-only: the checks of `vitpipe doctor`.

raw        format and layout > counts, classes and their order against the catalogue > released archives >
           decode a sample of images, or all of them
prepared   manifests, sizes and digests > checksums on request
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitpipe.config.digest import digest_of
from vitpipe.contracts.errors import DatasetError, VitpipeError
from vitpipe.contracts.units import counted
from vitpipe.data.manifest import (
    MANIFEST,
    DataManifest,
    DenseManifest,
    content_digest,
    read_manifest,
)
from vitpipe.datasets.catalogue import FACTS, class_names, facts
from vitpipe.datasets.layouts import layout_of, verified
from vitpipe.datasets.sources.class_listing import is_no_picture
from vitpipe.datasets.sources.detect_format import find_source, folder_of, forms_of
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare.examine import NO_PICTURE
from vitpipe.prepare.examine_parallel import PackOptions, examined
from vitpipe.prepare.expectations import (
    Say,
    compare_archives,
    compare_classes,
    compare_counts,
    expected_of,
    name_short_classes,
)
from vitpipe.prepare.findings import DatasetReport, Finding
from vitpipe.prepare.set_summary import read_set

SAMPLE = 200
"""Images that are decoded per dataset without `deep`."""
_MAX_NAMED = 5
_FIX_DIGESTS = "run the prepare stage again, or copy the prepared folder again"
_FIX_COUNTS = (
    "add what is missing and remove what does not belong to the dataset, unless it is a subset on purpose"
)


def examine(
    root: Path,
    datasets: Sequence[str] | None = None,
    *,
    deep: bool = False,
    checksums: bool = False,
    say: Say = lambda text: None,
) -> list[DatasetReport]:
    """Examine the datasets in a folder.

    Args:
        root: contains imagenet/, coco/, ... in any accepted format, or is the output of the prepare stage.
        datasets: names in the catalogue, or folders of class folders below `root`; None for all sets of the
            catalogue that are found.
        deep: decode every image, otherwise `SAMPLE` per dataset.
        checksums: read archives or shards and compare checksums.
        say: called with progress messages.

    Raises:
        DatasetError: if the folder does not exist or contains no dataset, or a name is unknown. Problems of a
            dataset itself are returned as findings.
    """
    if not root.is_dir():
        raise DatasetError(
            "The folder of the datasets does not exist",
            where=root,
            fix="correct --data, or create the folder",
        )
    for name in datasets or ():
        if not (root / name).is_dir():
            facts(name)  # raises for an unknown name
    prepared = (root / MANIFEST).is_file()
    names = list(datasets or (_prepared_sets(root) if prepared else _present(root)))
    if not names:
        raise DatasetError(
            "The folder contains no dataset",
            where=root,
            fix="give the folder that contains imagenet/, coco/, ..., not the folder of one dataset",
        )
    reports = []
    for name in names:
        report = DatasetReport(name)
        say(f"examining {name}")
        try:
            if prepared:
                _examine_prepared(report, root, checksums=checksums)
            elif name not in FACTS or FACTS[name].has_classes:
                _examine_source(report, root, deep=deep, checksums=checksums, say=say)
            else:
                _examine_layout(report, root, deep=deep, checksums=checksums, say=say)
        # One corrupt dataset must not hide the findings about the others.
        except VitpipeError as error:
            report.findings.append(Finding.of(error))
        except OSError as error:
            where, fix = error.filename or root / name, "make it readable for this user, or copy it again"
            report.add("error", f"The file cannot be read ({error.strerror or error})", where, fix)
        reports.append(report)
    return reports


def _present(root: Path) -> Iterator[str]:
    """Names of the datasets with a folder below `root`; DomainNet's six domains may share one."""
    for name, known in FACTS.items():
        shared = root / known.folder if known.folder else None
        # All domains together, as the six archives and their split lists are downloaded.
        if (root / name).is_dir() or (
            shared is not None and any(form.is_present(shared, name) for form in forms_of(known))
        ):
            yield name


def _examine_source(report: DatasetReport, root: Path, *, deep: bool, checksums: bool, say: Say) -> None:
    """Examine a classification dataset in any accepted format."""
    known, _ = expected_of(report.dataset, 0)
    folder = folder_of(root, known)
    if folder.is_dir():
        compare_archives(report, folder, checksums=checksums, say=say)
    source = find_source(root, report.dataset, known)
    report.form, report.num_classes = source.form, len(source.classes)
    # The releases of ImageNet-22K differ in the number of classes.
    known, keys = expected_of(report.dataset, len(source.classes))
    for note in source.notes:
        report.add("note", note)
    counts, others, sample = {}, _Examples(), _Sample(SAMPLE)
    for split in source.splits:
        # Classes without images must be counted as 0, or `name_short_classes` would miss them.
        per_class: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
        for entry in source.entries(split):
            per_class[source.classes[entry.label]] += 1
            if is_no_picture(entry.name):
                others.add(entry.shown)
            sample.add(entry)
        counts[split] = per_class
    report.num_train, report.num_val = (counts[split].total() for split in ("train", "val"))
    compare_counts(report, known, _FIX_COUNTS)
    compare_classes(report, source.classes, keys, source.root)
    for split, per_class in counts.items():
        name_short_classes(report, split, per_class, known, source.root)
    if others.number:
        fix = "remove them from the class folders, so that the counts are those of images"
        kinds = counted(
            others.number, "file is no picture by its kind", "files are no pictures by their kind"
        )
        verb = "is" if others.number == 1 else "are"
        what = f"{kinds} and {verb} left out: {others}"
        report.add("warning", what, source.root, fix)
    _decode(report, source, sample.entries, deep=deep)


def _decode(report: DatasetReport, source: Source, sample: Sequence[ImageEntry], *, deep: bool) -> None:
    """Decode images as the packer does; with `deep` all of them, in several processes."""
    total = (report.num_train or 0) + (report.num_val or 0)
    # A sample takes one core about 0.3 s, less than starting processes. sched_getaffinity respects cpusets.
    workers = len(os.sched_getaffinity(0)) if deep and total > SAMPLE else 0
    everything = (entry for split in source.splits for entry in source.entries(split))
    corrupt, anomalies, number = _Examples(), Counter[str](), 0
    # `shard_bytes` is 1 because nothing is written.
    for entry, image in examined(everything if deep else iter(sample), PackOptions(1, workers=workers)):
        number += 1
        if image.treatment == "left out" and image.finding != NO_PICTURE:
            corrupt.add(f"{entry.shown} ({image.finding})")
        elif image.finding:
            anomalies[image.finding] += 1
    if corrupt.number:
        fix = "replace them by intact copies, or set data.max_corrupt_images to leave them out"
        report.add(
            "error", f"{counted(corrupt.number, 'image')} cannot be decoded: {corrupt}", source.root, fix
        )
    for finding, count in sorted(anomalies.items()):
        report.add("note", f"{count:,} of the checked images: {finding}")
    _note_checked(report, number, total)


def _examine_layout(report: DatasetReport, root: Path, *, deep: bool, checksums: bool, say: Say) -> None:
    """Examine a dense dataset in folders or in its original archives."""
    name = report.dataset
    if (root / name).is_dir():
        compare_archives(report, root / name, checksums=checksums, say=say)
    kind = facts(name).kind
    layout = verified(kind, root / name, name)
    report.form, report.num_classes = layout.form, len(layout.classes)
    report.num_train, report.num_val = layout.counts["train_images"], layout.counts["val_images"]
    compare_counts(report, facts(name), _FIX_COUNTS)
    for note in layout.notes:
        report.add("note", note)
    for remark in layout.remarks:
        report.add("warning", remark.what, remark.where, remark.fix)
    # The embedded datasets have a subset of the classes, whose order cannot be compared.
    if set(layout.classes) == set(class_names(name)):
        compare_classes(report, layout.classes, class_names(name), layout.root)
    look = layout_of(kind).look_into(layout, None if deep else SAMPLE)
    report.findings += [Finding.of(problem) for problem in look.problems]
    _note_checked(report, look.num_looked, report.num_train + report.num_val)


def _examine_prepared(report: DatasetReport, root: Path, *, checksums: bool) -> None:
    """Examine one dataset in the output of the prepare stage."""
    # Imported here: the readers are not needed for raw datasets.
    from vitpipe.data.shards import open_shards, verify_checksums
    from vitpipe.datasets.dense_folder import check_dense

    name, whole = report.dataset, read_manifest(root, DataManifest)
    manifest = read_set(root, name)
    if isinstance(manifest, DenseManifest):
        dense = check_dense(root, name, checksums=checksums)
        report.form = "packed" if dense.archive else f"folder {dense.root}"
        report.num_train, report.num_val = dense.counts["train_images"], dense.counts["val_images"]
        report.num_classes, digests = len(dense.classes), (dense.digest, content_digest(dense))
        num_bytes = dense.size_bytes
    else:
        shards = manifest
        report.form = f"shards of {shards.form}" if shards.form else "shards"
        numbers = {split: len(open_shards(root, name, split)) for split in shards.splits}
        report.num_train, report.num_val = numbers.get("train"), numbers.get("val")
        report.num_classes, digests = len(shards.classes), (shards.digest, content_digest(shards))
        num_bytes = sum(split.size_bytes for split in shards.splits.values())
        for finding, count in shards.findings.items():
            report.add("note", f"{counted(count, 'image')}: {finding}", root / name)
        if checksums:
            verify_checksums(root, name)
    report.add("note", f"Checksums of {num_bytes:,} bytes {'match' if checksums else 'were not compared'}")
    # The recorded digest, the one computed from the manifest, and the one in the folder's own manifest.
    if len({*digests, whole.sets.get(name)}) > 1 or whole.data_digest != digest_of(whole.sets):
        report.add("error", "The digests in the manifests are inconsistent", root / MANIFEST, _FIX_DIGESTS)
    if report.num_classes:
        compare_counts(report, expected_of(name, report.num_classes)[0], _FIX_COUNTS)


def _prepared_sets(root: Path) -> tuple[str, ...]:
    return tuple(read_manifest(root, DataManifest).sets)


def _note_checked(report: DatasetReport, number: int, total: int) -> None:
    rest = "" if number >= total else "; --deep checks all"
    report.add("note", f"{number:,} of {total:,} images were checked{rest}")


class _Examples:
    """Counts names and keeps the first few for a message."""

    def __init__(self) -> None:
        self.number, self._named = 0, list[str]()

    def add(self, name: str) -> None:
        """Count one name."""
        self.number += 1
        if self.number <= _MAX_NAMED:
            self._named.append(name)

    def __str__(self) -> str:
        more = f" and {self.number - _MAX_NAMED:,} more" if self.number > _MAX_NAMED else ""
        return f"{', '.join(self._named)}{more}"


class _Sample:
    """A deterministic, evenly spaced sample of a stream of unknown length.

    Keeps `number` to `2 * number - 1` entries, or all of a shorter stream.
    """

    def __init__(self, number: int) -> None:
        self.entries: list[ImageEntry] = []
        self._number, self._stride, self._position = number, 1, 0

    def add(self, entry: ImageEntry) -> None:
        """Offer the next entry of the stream."""
        if self._position % self._stride == 0:
            self.entries.append(entry)
            if len(self.entries) == 2 * self._number:
                # Full: drop every second entry, and take half as many from here on.
                self.entries, self._stride = self.entries[::2], 2 * self._stride
        self._position += 1
