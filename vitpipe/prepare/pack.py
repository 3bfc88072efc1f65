"""Pack a source of images into tar shards with random access: in parallel, resumable, in constant memory.

    source.entries > [processes: read, decode, examine] > original order > shards, index, findings, journal

Workers examine images; one process writes them in the order of the source, so the bytes depend neither on the
number of workers nor on where a run was killed and resumed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath

from vitpipe.config.digest import digest_of
from vitpipe.contracts.errors import DatasetError, VitpipeError, disk_errors
from vitpipe.contracts.files import move_aside, write_whole
from vitpipe.contracts.units import counted
from vitpipe.data.manifest import (
    FINDINGS,
    MANIFEST,
    ShardManifest,
    SplitManifest,
    content_digest,
    read_listing,
    read_manifest,
    write_listing,
    write_manifest,
)
from vitpipe.data.shards import files_of
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare.examine import NO_PICTURE
from vitpipe.prepare.examine_parallel import PackOptions, examined
from vitpipe.prepare.shard_writer import ClosedShard, PackJournal, is_whole, open_cut, open_writer

_NAMED_IN_MESSAGE = 20
_SECONDS_BETWEEN_REPORTS = 5.0
_COLUMNS = ("split", "file", "finding", "treatment")


@dataclass
class Quarantine:
    """Counter of unusable images over all sets and splits of one prepare run."""

    limit: int
    num_left_out: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, file: str, reason: str) -> None:
        """Count one image; the first 20 are named in the error."""
        self.num_left_out += 1
        if len(self.named) < _NAMED_IN_MESSAGE:
            self.named.append(f"{file} ({reason})")

    def check(self, findings: Path) -> None:
        """Check the number of unusable images against the limit.

        Args:
            findings: the file that lists all of them.

        Raises:
            DatasetError: if there are more than `limit`.
        """
        if self.num_left_out <= self.limit:
            return
        more = self.num_left_out - len(self.named)
        raise DatasetError(
            f"{counted(self.num_left_out, 'image is', 'images are')} unusable, {self.limit} are "
            f"allowed: {', '.join(self.named)}" + (f" and {more} more" if more else ""),
            where=findings,
            fix="replace these files by intact copies, or set data.max_corrupt_images to at least "
            f"{self.num_left_out} to train without them; complete shards are kept",
        )


@dataclass(frozen=True)
class PackProgress:
    """Progress of one split; `seconds` since this process started it."""

    split: str
    num_entries: int
    num_bytes: int
    seconds: float


Report = Callable[[PackProgress], None]


def pack(
    source: Source,
    out: Path,
    *,
    options: PackOptions,
    quarantine: Quarantine,
    scratch: Path,
    previous: Path | None = None,
    report: Report = lambda progress: None,
) -> ShardManifest:
    """Pack all splits of a classification set and write its manifest.

    Args:
        out: the set's folder inside the prepared folder; created here.
        scratch: folder for unfinished work; the same folder resumes it. Must persist across a kill.
        previous: the set's folder of an earlier run; its shards are reused if the source is unchanged.
        report: called about every 5 s.

    Raises:
        DatasetError: if more images than `quarantine.limit` are unusable.
        RunError: if a worker process is killed.
        StorageError: if a write to the disk fails.
    """
    with disk_errors(scratch):
        reused = _reusable(source, options, previous)
        if reused is not None and previous is not None:
            # Images that the earlier run left out count against the limit again: it may be lower now.
            _count_findings(previous / FINDINGS, quarantine)
            _link(previous, out, [*_files_of(reused), FINDINGS])
            write_listing(out, read_listing(previous))
            write_manifest(out, reused)
            return reused
        # Corrupt images are counted after packing: one run lists all of them, and complete shards are kept.
        work = _open_scratch(scratch, options)
        packed = [_Split(source, split, work, options, report) for split in source.splits]
        splits = {split.name: split.run() for split in packed}
        manifest = ShardManifest(
            dataset=source.dataset,
            classes=source.classes,
            class_names=source.class_names,
            splits=splits,
            encoding=options.encoding,
            form=source.form,
            findings=_count_findings(_gather_findings(work, source), quarantine),
            notes=source.notes,
            digest="",
        )
        manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
        _link(work, out, [*_files_of(manifest), FINDINGS])
        write_listing(out, _listing_of(options, [split.listing.hexdigest() for split in packed]))
        write_manifest(out, manifest)  # last: a set with a manifest is complete
    return manifest


class _Split:
    """Packing of one split; resumes after the last journal line if the source is unchanged up to there."""

    def __init__(self, source: Source, name: str, work: Path, options: PackOptions, report: Report) -> None:
        self.source, self.name, self.work = source, name, work
        self.options, self.report = options, report
        self.journal = PackJournal(work / f"{name}.journal")
        self.listing = hashlib.blake2b(digest_size=16)
        self.num_entries = 0
        self._started = self._reported = time.monotonic()

    def run(self) -> SplitManifest:
        """Pack the entries that are not packed yet."""
        hashed, findings = self.options.hashed, self.work / f"{self.name}.findings"
        entries = self._continue()
        with (
            open_writer(self.work, self.name, self.journal, hashed=hashed) as writer,
            open_cut(findings, self.journal.last.findings_bytes) as found,
        ):

            def close() -> None:
                # The journal line comes last: it may only claim what is on the disk already.
                found.flush()
                os.fsync(found.fileno())
                shard = writer.close_shard()
                self.journal.write(
                    ClosedShard(
                        shard=shard,
                        num_entries=self.num_entries,
                        listing=self.listing.hexdigest(),
                        findings_bytes=found.tell(),
                    )
                )

            for entry, image in examined(entries, self.options):
                self._count(entry)
                if image.finding:
                    row = (self.name, entry.shown, image.finding, image.treatment)
                    found.write(_csv_line(row))
                if image.content:
                    # WebDataset chooses the decoder by the extension, so converted images get a new one.
                    name = PurePath(entry.name).stem + image.suffix if image.suffix else entry.name
                    writer.add(name, entry.label, image.content, image.hash)
                if writer.open_bytes >= self.options.shard_bytes:
                    close()
                self._report_progress(writer.num_bytes + writer.open_bytes)
            # Also without an open shard: the last images may all have been left out.
            if self.num_entries > self.journal.last.num_entries:
                close()
            return writer.manifest(len(self.source.classes))

    def _continue(self) -> Iterator[ImageEntry]:
        """The entries that are not packed yet; discards all progress if source or files have changed."""
        last = self.journal.last
        if is_whole(self.work, self.name, self.journal, hashed=self.options.hashed):
            entries = self.source.entries(self.name)
            # Names and stamps only; nothing is read or decoded again.
            for entry in islice(entries, last.num_entries):
                self._count(entry)
            if last.num_entries == 0 or self.listing.hexdigest() == last.listing:
                return entries
        # The digest covers all entries up to the last line, so no earlier shard is known to be unchanged.
        self.journal.clear()
        self.listing, self.num_entries = hashlib.blake2b(digest_size=16), 0
        return self.source.entries(self.name)

    def _count(self, entry: ImageEntry) -> None:
        if not 0 <= entry.label < len(self.source.classes):
            raise DatasetError(
                f"An image has label {entry.label}, but there are {len(self.source.classes)} classes",
                where=f"{self.source.root}: {entry.shown}",
                fix="compare the file with its published checksum and download it again",
            )
        self.listing.update(_line_of(entry))
        self.num_entries += 1

    def _report_progress(self, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self.report(PackProgress(self.name, self.num_entries, num_bytes, now - self._started))


def _reusable(source: Source, options: PackOptions, previous: Path | None) -> ShardManifest | None:
    """The manifest of an earlier run, if source and packing options are the same and no file is missing."""
    if previous is None or not (previous / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(previous, ShardManifest)
    except DatasetError:
        return None
    listings = []
    for split in source.splits:
        listing = hashlib.blake2b(digest_size=16)
        for entry in source.entries(split):
            listing.update(_line_of(entry))
        listings.append(listing.hexdigest())
    same = read_listing(previous) == _listing_of(options, listings) and manifest.classes == source.classes
    if not same or any(not (previous / name).is_file() for name in [*_files_of(manifest), FINDINGS]):
        return None
    # Shards may have been deleted from a store by other means, so its listing is compared too.
    try:
        sizes = storage_of(previous, manifest.store).sizes()
    except VitpipeError:  # the store does not answer: pack again; the upload reports the error
        return None
    whole = all(sizes.get(name) == size_bytes for name, _, size_bytes in files_of(manifest))
    return manifest if whole else None


def _open_scratch(scratch: Path, options: PackOptions) -> Path:
    """Reuse unfinished work of the same options; rename other content, which may be hours of work."""
    mark = scratch / "options"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != options.digest():
        if scratch.is_dir() and any(scratch.iterdir()):
            move_aside(scratch, "other-packing-options" if mark.is_file() else "not-of-vitpipe")
        scratch.mkdir(parents=True, exist_ok=True)
        # Written first: whatever is in the folder later was packed with these options.
        write_whole(mark, options.digest())
    return scratch


def _gather_findings(work: Path, source: Source) -> Path:
    """Concatenate the findings of all splits, with a header line."""
    path = work / FINDINGS
    with path.open("wb") as together:
        together.write(_csv_line(_COLUMNS))
        for split in source.splits:
            together.write((work / f"{split}.findings").read_bytes())
    return path


def _count_findings(findings: Path, quarantine: Quarantine) -> dict[str, int]:
    """Count findings by kind, and add images that were left out, now or in an earlier run, to the quarantine.

    Raises:
        DatasetError: if too many were left out.
    """
    counts: Counter[str] = Counter()
    with findings.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            left_out = row["treatment"] == "left out" and row["finding"] != NO_PICTURE
            counts["left out" if left_out else row["finding"]] += 1
            if left_out:
                quarantine.add(row["file"], row["finding"])
    quarantine.check(findings)
    return dict(sorted(counts.items()))


def _files_of(manifest: ShardManifest) -> list[str]:
    """Names of the files next to the manifest, except findings.csv. Shards in a store are not among them."""
    names = [] if manifest.store else [name for name, _, _ in files_of(manifest)]
    return names + [split.hashes for split in manifest.splits.values() if split.hashes]


def _link(folder: Path, out: Path, names: Sequence[str]) -> None:
    """Hard-link files into another folder, or copy them if the file system has no hard links."""
    out.mkdir(parents=True)
    for name in names:
        # Linked, not moved: the scratch folder stays resumable if the stage fails in a later dataset.
        try:
            (out / name).hardlink_to(folder / name)
        except OSError:
            shutil.copyfile(folder / name, out / name)


def _line_of(entry: ImageEntry) -> bytes:
    # File names on Linux are bytes; Python decodes invalid UTF-8 to surrogates.
    return f"{entry.name}\0{entry.label}\0{entry.place.stamp()}\n".encode(errors="surrogateescape")


def _listing_of(options: PackOptions, listings: Sequence[str]) -> str:
    # With the options: they make other shards of the same images.
    return digest_of([options.digest(), *listings])


def _csv_line(row: Sequence[str]) -> bytes:
    # As bytes, because a resumed run truncates the file to the size in the journal.
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(row)
    # File names need not be valid UTF-8; escaped, the file remains readable as UTF-8.
    return buffer.getvalue().encode(errors="backslashreplace")
