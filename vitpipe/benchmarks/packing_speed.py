"""Packing speed, and peak memory over the number of images.

Each measurement runs in a fresh process, so that peak memory is that of one measurement.
"""

from __future__ import annotations

import datetime
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from vitpipe.benchmarks import photographs
from vitpipe.benchmarks.process_memory import peak_resident_mb
from vitpipe.contracts.errors import RunError
from vitpipe.contracts.units import counted
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import Quarantine, pack
from vitpipe.prepare.packing_cost import PackSpeed, write_pack_speed

# Smaller than in real sets, so that few photographs fill several shards.
_SHARD_BYTES = 64_000_000
# Further small images are hard links to these: writing 100,000 files would take longer than packing them, and
# the packer reads, decodes and writes each link like a file of its own.
_NUM_DIFFERENT = 2_000
_SMALL_SIDE = 64
_SMALL_QUALITY = 90

Say = Callable[[str], None]


@dataclass(frozen=True)
class PackCost:
    """One measurement.

    Attributes:
        images: size of the images in pixels.
        workers: processes that read and decode.
        megabytes_per_second: bytes of the source files, 10^6 per MB.
        peak_packer_mb: peak resident size of the packing process in MB (10^6 bytes).
        peak_worker_mb: of its largest worker, an upper bound.
    """

    images: str
    num_images: int
    workers: int
    seconds: float
    images_per_second: float
    megabytes_per_second: float
    peak_packer_mb: float
    peak_worker_mb: float


def measure_packing(
    root: Path, counts: tuple[int, ...], num_photographs: int, workers: int, say: Say
) -> list[PackCost]:
    """Pack photographs of 500 x 375, then small images in each of several numbers.

    Args:
        root: an empty folder with space for images and shards; the caller deletes it.
        counts: numbers of small images.
        num_photographs: number of photographs.
        workers: processes that read and decode.
        say: receives what is being measured.

    Raises:
        RunError: when a measuring process exits without a result.
    """
    # Two sizes: photographs are limited by decoding (MB/s), small images by the work per file (images/s).
    say(f"{counted(num_photographs, 'photograph')} of 500 x 375")
    _write(root / "photographs", photographs.Photographs(num_photographs), num_photographs)
    costs = [_measure_in_fresh_process("500 x 375", root / "photographs", root / "out", workers)]
    for count in counts:
        say(f"{counted(count, 'small image')}")
        small = photographs.Photographs(min(count, _NUM_DIFFERENT), _SMALL_SIDE, _SMALL_SIDE, _SMALL_QUALITY)
        folder = root / f"small-{count}"
        _write(folder, small, count)
        costs.append(
            _measure_in_fresh_process(f"{_SMALL_SIDE} x {_SMALL_SIDE}", folder, root / "out", workers)
        )
        shutil.rmtree(folder)
    return costs


def keep_speed(costs: list[PackCost]) -> Path:
    """Save the speeds for `vitpipe plan`: images/s of small images, MB/s of photographs, per core.

    Args:
        costs: of the photographs first, then of small images.

    Returns:
        The file.
    """
    large, *small = costs
    cores = max(large.workers, 1)  # without workers the packer decodes itself
    speed = PackSpeed(
        images_per_second_per_core=max(cost.images_per_second for cost in small or [large]) / cores,
        megabytes_per_second_per_core=large.megabytes_per_second / cores,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cores=cores,
    )
    return write_pack_speed(speed)


def _write(folder: Path, wanted: photographs.Photographs, count: int) -> None:
    """Write class folders of `count` images; those beyond `wanted.number` are hard links."""
    photographs.write(folder / "train", wanted)
    originals = sorted((folder / "train").rglob("*.jpg"))
    for number in range(len(originals), count):
        original = originals[number % len(originals)]
        (original.parent / f"{number:07d}.jpg").hardlink_to(original)
    # The packer demands every class in both splits: one image of each class in val.
    for path in {original.parent: original for original in originals}.values():
        val = folder / "val" / path.parent.name / path.name
        val.parent.mkdir(parents=True)
        val.hardlink_to(path)


def _measure_in_fresh_process(images: str, folder: Path, out: Path, workers: int) -> PackCost:
    # spawn: a forked process would start with this one's memory.
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_pack_and_measure, args=(images, folder, out, workers, sender))
    process.start()
    sender.close()  # else `recv` would wait for ever after the process has exited
    try:
        cost: PackCost = receiver.recv()
    except EOFError as error:
        raise RunError(
            "The measuring process exited without a result",
            where=f"packing {images}",
            fix="correct the error that it printed above, or give fewer --workers, which need less memory",
        ) from error
    finally:
        process.join()
        for path in (out, out.with_name("scratch")):
            shutil.rmtree(path, ignore_errors=True)
    return cost


def _pack_and_measure(images: str, folder: Path, out: Path, workers: int, sender: Connection) -> None:
    source = read_class_folders(folder, "imagenet")
    options = PackOptions(_SHARD_BYTES, workers=workers)
    started = time.perf_counter()
    manifest = pack(source, out, options=options, quarantine=Quarantine(0), scratch=out.with_name("scratch"))
    seconds, own_mb = time.perf_counter() - started, peak_resident_mb()
    num_images = sum(split.num_images for split in manifest.splits.values())
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    # An upper bound: ru_maxrss survives exec, so a worker's begins with the packer's memory at its start.
    worker_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    speed, volume = num_images / seconds, num_bytes / 1e6 / seconds
    sender.send(PackCost(images, num_images, workers, seconds, speed, volume, own_mb, worker_mb))
