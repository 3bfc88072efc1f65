"""Examine the images of a source in several processes: results in order, bounded memory."""

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
from vitpipe.datasets.sources.class_listing import is_no_picture
from vitpipe.datasets.sources.source import ImageEntry
from vitpipe.prepare.examine import NO_PICTURE, Examined, examine

# Increase it when the same source would give other bytes: shards of earlier versions are then not reused.
# 2: 16-bit grey by its upper byte in every image, damaged profiles taken off, text files left out.
PACK_VERSION = 2
# Images per task: less inter-process communication, while a task of 16 photographs is still only a few MB.
_BATCH = 16


@dataclass(frozen=True)
class PackOptions:
    """Packing options.

    Attributes:
        shard_bytes: a shard is closed as soon as it has at least this size.
        encoding: resize large images; None keeps every byte.
        hashed: store a perceptual hash of every image, for the search for near duplicates.
        workers: processes that read and decode; 0 uses the calling process. Does not affect the bytes.
    """

    shard_bytes: int
    encoding: Encoding | None = None
    hashed: bool = False
    workers: int = 0

    def digest(self) -> str:
        """Digest of everything that affects the packed bytes."""
        encoding = self.encoding and self.encoding.model_dump()
        return digest_of([PACK_VERSION, self.shard_bytes, encoding, self.hashed])


def examined(entries: Iterator[ImageEntry], options: PackOptions) -> Iterator[tuple[ImageEntry, Examined]]:
    """Yield every entry with its examined image, in the order of `entries`.

    At most `2 * options.workers + 1` batches of images are in memory at any time.

    Raises:
        RunError: if a worker process is killed, for example by the out-of-memory killer.
    """
    if options.workers == 0:
        for entry in entries:
            yield entry, _examine_one(entry.place, entry.name, options)
        return
    # Spawned, not forked: the tracker has threads, and a fork copies their locks in whatever state they are.
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"), initializer=_end_with_parent)
    window: deque[tuple[list[ImageEntry], Future[list[Examined]]]] = deque()
    try:
        while batch := list(islice(entries, _BATCH)):
            work = [(entry.place, entry.name) for entry in batch]
            # Executor.map would read all entries at once: 14 million for ImageNet-22K.
            window.append((batch, pool.submit(_examine_many, work, options)))
            # Two batches per worker: one is examined, one waits, so that no worker is idle.
            if len(window) > 2 * options.workers:
                done, future = window.popleft()
                yield from zip(done, future.result(), strict=True)
        while window:
            done, future = window.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise RunError(
            "A worker process of the packer was killed, possibly by the out-of-memory killer",
            where="packing",
            fix="reduce data.workers and run the stage again; it continues after the last complete shard",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _examine_many(work: Sequence[tuple[ByteRange, str]], options: PackOptions) -> list[Examined]:
    return [_examine_one(place, name, options) for place, name in work]


def _examine_one(place: ByteRange, name: str, options: PackOptions) -> Examined:
    if is_no_picture(name):
        return Examined(b"", "", NO_PICTURE, "left out")
    try:
        content = place.read()
    except OSError as error:
        # One unreadable file among millions counts against data.max_corrupt_images like a corrupt one.
        return Examined(b"", "", f"cannot be read: {error.strerror or error}", "left out")
    return examine(content, name, encoding=options.encoding, hashed=options.hashed)


def _end_with_parent() -> None:
    """Exit with the parent process: spawned workers of a killed packer would wait for work for ever."""
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # sys.exit in a thread ends the thread only

    threading.Thread(target=wait, daemon=True).start()
