"""Images of a source examined by several processes, in order, a bounded number at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, get_context, parent_process

from vitpipe.config.digest import digest_of
from vitpipe.contracts.errors import RunError
from vitpipe.data.manifest import Encoding
from vitpipe.datasets.sources.byte_ranges import ByteRange
from vitpipe.datasets.sources.source import ImageEntry
from vitpipe.prepare.examine import Examined, examine

# Raise it when the same source would give other bytes: finished shards are then not taken again.
PACK_VERSION = 1
_BATCH = 16


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        shard_bytes: a shard is closed when it has reached this size.
        encoding: make large images smaller; None keeps every byte.
        hashed: keep a perceptual hash of every image, for the search for near duplicates.
        workers: processes that read and decode; 0 does it in this one. Does not change the bytes.
    """

    shard_bytes: int
    encoding: Encoding | None = None
    hashed: bool = False
    workers: int = 0

    def digest(self) -> str:
        """What decides the bytes."""
        encoding = self.encoding and self.encoding.model_dump()
        return digest_of([PACK_VERSION, self.shard_bytes, encoding, self.hashed])


def examined(entries: Iterator[ImageEntry], options: PackOptions) -> Iterator[tuple[ImageEntry, Examined]]:
    """Every entry with what becomes of its image, in order; a bounded number is under way at any time.

    Raises:
        RunError: when a worker process is killed, for example for want of memory.
    """
    if options.workers == 0:
        for entry in entries:
            yield entry, _examine_one(entry.place, entry.name, options)
        return
    # Not forked: the tracker has threads, and a fork would copy their locks as they are at that moment.
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"), initializer=_end_with_parent)
    window: deque[tuple[list[ImageEntry], Future[list[Examined]]]] = deque()
    try:
        while batch := list(islice(entries, _BATCH)):
            work = [(entry.place, entry.name) for entry in batch]
            window.append((batch, pool.submit(_examine_many, work, options)))
            if len(window) > 2 * options.workers:
                done, future = window.popleft()
                yield from zip(done, future.result(), strict=True)
        while window:
            done, future = window.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise RunError(
            "A process that checks images was killed, perhaps for want of memory",
            where="packing",
            fix="run the stage again, it goes on where it was; data.workers sets the number of processes",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _examine_many(work: Sequence[tuple[ByteRange, str]], options: PackOptions) -> list[Examined]:
    return [_examine_one(place, name, options) for place, name in work]


def _examine_one(place: ByteRange, name: str, options: PackOptions) -> Examined:
    try:
        content = place.read()
    except OSError as error:
        return Examined(b"", "", f"cannot be read: {error.strerror or error}", "left out")
    return examine(content, name, encoding=options.encoding, hashed=options.hashed)


def _end_with_parent() -> None:
    """A killed packer must not leave processes behind that wait for work for ever."""
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
