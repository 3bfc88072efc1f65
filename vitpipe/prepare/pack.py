"""A source of images into tar shards that are read by position: in parallel, resumable, in constant memory.

    source.entries > [processes: read, decode, examine] > in order again > shards, index, findings, journal

Workers look at images; one process writes, in the order of the source. So the bytes do not depend on the
number of workers, nor on where a run was killed and begun again.
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
from vitpipe.data.manifest import (
    FINDINGS,
    MANIFEST,
    ShardManifest,
    SplitManifest,
    content_digest,
    read_manifest,
    write_manifest,
)
from vitpipe.data.shards import files_of
from vitpipe.data.storage.open_storage import storage_of
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare.examine_parallel import PackOptions, examined
from vitpipe.prepare.shard_writer import ClosedShard, PackJournal, is_whole, open_cut, open_writer

_NAMED_IN_MESSAGE = 20
_SECONDS_BETWEEN_REPORTS = 5.0
_COLUMNS = ("split", "file", "finding", "treatment")


@dataclass
class Quarantine:
    """Counts images that cannot be used, over all sets and splits of one prepare run."""

    limit: int
    num_left_out: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, file: str, reason: str) -> None:
        """Count one image; the first ones are remembered for the message."""
        self.num_left_out += 1
        if len(self.named) < _NAMED_IN_MESSAGE:
            self.named.append(f"{file} ({reason})")

    def check(self, findings: Path) -> None:
        """Refuse more of them than allowed.

        Args:
            findings: the file that lists them all.

        Raises:
            DatasetError: naming the first files and the list.
        """
        if self.num_left_out <= self.limit:
            return
        more = self.num_left_out - len(self.named)
        raise DatasetError(
            f"{self.num_left_out} files cannot be used, {self.limit} are allowed: {', '.join(self.named)}"
            + (f" and {more} more" if more else ""),
            where=findings,
            fix="replace these files by good copies, or set data.max_corrupt_images to at least "
            f"{self.num_left_out} to train without them; what is packed already is kept",
        )


@dataclass(frozen=True)
class PackProgress:
    """How far packing is; `seconds` since this process began with the split."""

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
        out: the set's folder inside the prepared folder; made here.
        scratch: where unfinished work is kept; the same folder continues it. Must outlive a kill.
        previous: the set's folder of an earlier run; if the source is unchanged, its shards are taken.
        report: called now and then.

    Raises:
        DatasetError: when more images than allowed cannot be used.
        RunError: when a worker process is killed.
        StorageError: when the disk refuses a write.
    """
    with disk_errors(scratch):
        taken = _packed_before(source, options, previous)
        if taken is not None and previous is not None:
            _account(previous / FINDINGS, quarantine)
            _link(previous, out, [*_files_of(taken), FINDINGS])
            write_manifest(out, taken)
            return taken
        work = _claim(scratch, options)
        packed = [_Split(source, split, work, options, report) for split in source.splits]
        splits = {split.name: split.run() for split in packed}
        manifest = ShardManifest(
            dataset=source.dataset,
            classes=source.classes,
            class_names=source.class_names,
            splits=splits,
            encoding=options.encoding,
            form=source.form,
            findings=_account(_gather_findings(work, source), quarantine),
            listing=_listing_of(options, [split.listing.hexdigest() for split in packed]),
            notes=source.notes,
            digest="",
        )
        manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
        _link(work, out, [*_files_of(manifest), FINDINGS])
        write_manifest(out, manifest)
    return manifest


class _Split:
    """Packing of one split: continues where its journal ends, if the source is still the same there."""

    def __init__(self, source: Source, name: str, work: Path, options: PackOptions, report: Report) -> None:
        self.source, self.name, self.work = source, name, work
        self.options, self.report = options, report
        self.journal = PackJournal(work / f"{name}.journal")
        self.listing = hashlib.blake2b(digest_size=16)
        self.num_entries = 0
        self._started = self._reported = time.monotonic()

    def run(self) -> SplitManifest:
        """Pack what is not packed yet."""
        hashed, findings = self.options.hashed, self.work / f"{self.name}.findings"
        entries = self._continue()
        with (
            open_writer(self.work, self.name, self.journal, hashed=hashed) as writer,
            open_cut(findings, self.journal.last.findings_bytes) as found,
        ):

            def close() -> None:
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
                    name = PurePath(entry.name).stem + image.suffix if image.suffix else entry.name
                    writer.add(name, entry.label, image.content, image.hash)
                if writer.open_bytes >= self.options.shard_bytes:
                    close()
                self._tell(writer.num_bytes + writer.open_bytes)
            if self.num_entries > self.journal.last.num_entries:
                close()
            return writer.manifest(len(self.source.classes))

    def _continue(self) -> Iterator[ImageEntry]:
        """The entries that are still to do."""
        last = self.journal.last
        if is_whole(self.work, self.name, self.journal, hashed=self.options.hashed):
            entries = self.source.entries(self.name)
            for entry in islice(entries, last.num_entries):
                self._count(entry)
            if last.num_entries == 0 or self.listing.hexdigest() == last.listing:
                return entries
        # The source has changed, or somebody has been at the files: what is packed is of no use.
        self.journal.clear()
        self.listing, self.num_entries = hashlib.blake2b(digest_size=16), 0
        return self.source.entries(self.name)

    def _count(self, entry: ImageEntry) -> None:
        if not 0 <= entry.label < len(self.source.classes):
            raise DatasetError(
                f"An image has class number {entry.label}, there are {len(self.source.classes)} classes",
                where=f"{self.source.root}: {entry.shown}",
                fix="compare the file with its published checksum and get it again",
            )
        self.listing.update(_line_of(entry))
        self.num_entries += 1

    def _tell(self, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self.report(PackProgress(self.name, self.num_entries, num_bytes, now - self._started))


def _packed_before(source: Source, options: PackOptions, previous: Path | None) -> ShardManifest | None:
    """The manifest of an earlier run, if the source and all that decides the bytes are as they were."""
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
    same = manifest.listing == _listing_of(options, listings) and manifest.classes == source.classes
    if not same or any(not (previous / name).is_file() for name in [*_files_of(manifest), FINDINGS]):
        return None
    try:
        sizes = storage_of(previous, manifest.store).sizes()
    except VitpipeError:  # the store is gone or does not answer: pack, and say so when it is needed
        return None
    whole = all(sizes.get(name) == size_bytes for name, _, size_bytes in files_of(manifest))
    return manifest if whole else None


def _claim(scratch: Path, options: PackOptions) -> Path:
    """Keep unfinished work that was made the same way, move other aside: hours may be in it."""
    mark = scratch / "options"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != options.digest():
        if scratch.is_dir() and any(scratch.iterdir()):
            move_aside(scratch, "other-packing-options" if mark.is_file() else "not-of-vitpipe")
        scratch.mkdir(parents=True, exist_ok=True)
        write_whole(mark, options.digest())
    return scratch


def _gather_findings(work: Path, source: Source) -> Path:
    """One list over all splits, with a line of column names."""
    path = work / FINDINGS
    with path.open("wb") as together:
        together.write(_csv_line(_COLUMNS))
        for split in source.splits:
            together.write((work / f"{split}.findings").read_bytes())
    return path


def _account(findings: Path, quarantine: Quarantine) -> dict[str, int]:
    """Counts by kind; images that were left out, now or by an earlier run, go to the quarantine's account.

    Raises:
        DatasetError: when they are too many.
    """
    counts: Counter[str] = Counter()
    with findings.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            left_out = row["treatment"] == "left out"
            counts["left out" if left_out else row["finding"]] += 1
            if left_out:
                quarantine.add(row["file"], row["finding"])
    quarantine.check(findings)
    return dict(sorted(counts.items()))


def _files_of(manifest: ShardManifest) -> list[str]:
    """Files that lie beside the manifest, but for the list of findings."""
    names = [] if manifest.store else [name for name, _, _ in files_of(manifest)]
    return names + [split.hashes for split in manifest.splits.values() if split.hashes]


def _link(folder: Path, out: Path, names: Sequence[str]) -> None:
    """The same files in another folder: linked where the file system can, copied where not."""
    out.mkdir(parents=True)
    for name in names:
        try:
            (out / name).hardlink_to(folder / name)
        except OSError:
            shutil.copyfile(folder / name, out / name)


def _line_of(entry: ImageEntry) -> bytes:
    return f"{entry.name}\0{entry.label}\0{entry.place.stamp()}\n".encode(errors="surrogateescape")


def _listing_of(options: PackOptions, listings: Sequence[str]) -> str:
    return digest_of([options.digest(), *listings])


def _csv_line(row: Sequence[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(row)
    # File names need not be valid text.
    return buffer.getvalue().encode(errors="backslashreplace")
