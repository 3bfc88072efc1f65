"""The verbs `benchmark reversible`, `data`, `pack` and `index`: what design choices cost on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.verbs.show import print_rows

JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]
ScratchOption = Annotated[
    Path | None, typer.Option(help="where test images and shards go and are removed  [default: temporary]")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure what design choices cost on this machine.")
    for name, verb in (("reversible", reversible), ("data", data), ("pack", pack), ("index", index)):
        group.command(name=name)(verb)
    app.add_typer(group, name="benchmark")


def reversible(
    columns: Annotated[
        list[int] | None,
        typer.Option(
            "--columns", help="total number, half of each kind; may be repeated  [default: 2 4 8 16]"
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="channels of every level, 64 per attention head")] = 192,
    depth: Annotated[int, typer.Option(min=1, help="blocks per level")] = 1,
    image_size: Annotated[int, typer.Option(min=1, help="pixels per side")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="timed steps of each way")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1  [default: a GPU if any]")] = None,
    figure: Annotated[Path | None, typer.Option(help="draw memory and time here (.png)")] = None,
    error_figure: Annotated[
        Path | None, typer.Option(help="measure errors over the scales too and draw them here (.png)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Memory, time and exactness of reversible columns against plain autograd and checkpointing."""
    for path in (figure, error_figure):
        check_figure(path)
    from vitpipe.benchmarks.memory_mode_figures import draw_errors, draw_steps, notes, step_rows
    from vitpipe.benchmarks.memory_modes import Setting, find_device, measure_scales, measure_steps
    from vitpipe.report.figures import PAPER, save_png

    setting = Setting(
        columns=tuple(columns or Setting.columns),
        width=width,
        depth=depth,
        image_size=image_size,
        batch=batch,
        num_rounds=rounds,
    )
    on = find_device(device)
    costs = measure_steps(setting, on, _tell)
    errors = measure_scales(setting, on, say=_tell) if error_figure else []
    with disk_errors(figure or error_figure or ""):
        if figure:
            save_png(draw_steps(costs, PAPER), figure)
        if error_figure:
            save_png(draw_errors(errors, PAPER), error_figure)
    if as_json:
        found = {"setting": setting, "device": str(on), "steps": costs, "scales": errors}
        _print_json(found)
        return
    print_rows(step_rows(costs), False, setting.describe(on))
    print("\n".join(notes(costs)))


def data(
    images: Annotated[int, typer.Option(min=32, help="photographs")] = 256,
    quality: Annotated[int, typer.Option(min=50, max=100, help="of the JPEGs of 500 x 375")] = 96,
    image_size: Annotated[int, typer.Option(min=16, help="side of the tensors in pixels")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="images per batch")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each side; the median counts")] = 5,
    figure: Annotated[Path | None, typer.Option(help="draw speeds and shares here (.png)")] = None,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Batches per second from shards beside torchvision's ImageFolder: same pixels, one core, one run."""
    check_figure(figure)
    import torch

    from vitpipe.benchmarks import photographs
    from vitpipe.benchmarks.data_path import Setting, measure_paths, measure_shares
    from vitpipe.benchmarks.data_path_figures import describe, draw, path_rows, share_rows
    from vitpipe.report.figures import PAPER, save_png

    torch.set_num_threads(1)
    wanted = photographs.Photographs(images, quality=quality)
    setting = Setting(wanted, image_size=image_size, batch=batch, num_rounds=rounds)
    if images < batch:
        raise InputError(
            f"{images} images do not fill a batch of {batch}", where="--images", fix="give more images"
        )
    with _scratch(scratch) as root:
        num_bytes = photographs.write(root / "train", wanted)
        photographs.write(root / "val", dataclasses.replace(wanted, number=10))
        speeds = measure_paths(root, setting, _tell)
        shares = measure_shares(root, setting)
    with disk_errors(figure or ""):
        if figure:
            save_png(draw(speeds, shares, PAPER), figure)
    if as_json:
        _print_json({"setting": setting, "mean_bytes": num_bytes / images, "paths": speeds, "steps": shares})
        return
    print_rows(path_rows(speeds), False, describe(setting, num_bytes / images))
    print_rows(share_rows(shares), False, "Fine-tuning's path, step by step: ms per image")


def pack(
    counts: Annotated[
        list[int] | None,
        typer.Option("--count", help="how many small images; may be repeated  [default: 1000 10000 100000]"),
    ] = None,
    num_photographs: Annotated[int, typer.Option("--photographs", min=10, help="of 500 x 375")] = 4000,
    workers: Annotated[int | None, typer.Option(min=0, help="processes  [default: one per core]")] = None,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Packing speed and peak memory over the number of images; `plan` uses what was measured."""
    import os

    from vitpipe.benchmarks.packing_speed import keep_speed, measure_packing

    chosen = tuple(counts or (1_000, 10_000, 100_000))
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    with _scratch(scratch) as root:
        costs = measure_packing(root, chosen, num_photographs, num_workers, _tell)
    kept = keep_speed(costs)
    if as_json:
        _print_json({"costs": costs, "kept": str(kept)})
        return
    rows = [
        {
            "images": cost.images,
            "number": f"{cost.num_images:,}",
            "seconds": f"{cost.seconds:.1f}",
            "images/s": f"{cost.images_per_second:,.0f}",
            "MB/s": f"{cost.megabytes_per_second:.1f}",
            "peak of packer, MB": f"{cost.peak_packer_mb:.0f}",
            "peak of largest worker, MB": f"{cost.peak_worker_mb:.0f}",
        }
        for cost in costs
    ]
    print_rows(rows, False, f"Packing with {num_workers} processes")
    print(with_typed_commands(f"`vitpipe plan` now counts with this machine's speed: {kept}"))


def index(
    entries: Annotated[int, typer.Option(min=1, help="images of the synthetic set")] = 14_000_000,
    classes: Annotated[int, typer.Option(min=1, help="its classes")] = 21_841,
    rounds: Annotated[int, typer.Option(min=1, help="fresh processes")] = 3,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory to open an index of millions of images and to shuffle an epoch."""
    from vitpipe.benchmarks.index_scale import measure_index, write_synthetic_set

    with _scratch(scratch) as root:
        _tell(f"writing an index of {entries:,} images")
        write_synthetic_set(root, entries, classes)
        costs = measure_index(root, rounds, _tell)
    if as_json:
        _print_json(costs)
        return
    rows = [
        {
            "shards": f"{cost.num_shards:,}",
            "index, MB": f"{cost.index_mb:.0f}",
            "open, s": f"{cost.open_seconds:.3f}",
            "shuffle, s": f"{cost.shuffle_seconds:.2f}",
            "100 steps amid an epoch, s": f"{cost.steps_seconds:.2f}",
            "peak, MB": f"{cost.peak_mb:.0f}",
            "of that imports, MB": f"{cost.imports_mb:.0f}",
        }
        for cost in costs
    ]
    print_rows(rows, False, f"An index of {entries:,} images")


@contextmanager
def _scratch(given: Path | None) -> Iterator[Path]:
    """An empty folder that goes afterwards.

    Raises:
        StorageError: when the disk refuses a write.
    """
    with disk_errors(given or tempfile.gettempdir()):
        if given is not None:
            given.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vitpipe-benchmark-", dir=given) as folder:
            yield Path(folder)


def check_figure(path: Path | None) -> None:
    """Refuse, before anything is measured, a figure that cannot be written.

    Raises:
        InputError: when the name does not end in .png.
    """
    if path is not None and path.suffix != ".png":
        raise InputError(f"'{path}' is not the name of a PNG file", where="figures", fix="end it in .png")


def _print_json(found: Any) -> None:
    text = json.dumps(found, default=dataclasses.asdict)
    # JSON knows no infinity, which an error can be.
    print(json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2))


def _tell(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)
