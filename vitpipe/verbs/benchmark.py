"""The verbs of `benchmark`: time and memory on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import counted, format_bytes, format_count, format_duration
from vitpipe.verbs.benchmark_networks import OF_NETWORKS, DeviceOption, check_figure, print_json, tell
from vitpipe.verbs.completion import complete_profile, complete_recipe, complete_stage
from vitpipe.verbs.options import JsonOption, SetOption
from vitpipe.verbs.show import print_rows

_MB = 1e6
ScratchOption = Annotated[
    Path | None, typer.Option(help="folder for temporary test images and shards  [default: system's]")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure time and memory on this machine.")
    for verb in (step, reversible, data, pack, index, *OF_NETWORKS):
        group.command(name=verb.__name__)(verb)
    app.add_typer(group, name="benchmark")


def step(
    recipe: Annotated[
        str, typer.Argument(help="for example itpn/pixel_base", autocompletion=complete_recipe)
    ],
    stage: Annotated[
        str | None,
        typer.Option(
            help="pretrain, intermediate, finetune, ...  [default: the recipe's first of them]",
            autocompletion=complete_stage,
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help="demo, full, ...", autocompletion=complete_profile)] = "full",
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="timed steps")] = 10,
    overrides: SetOption = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="classes of the labels  [default: those of the stage's dataset]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of torch on a CPU  [default: as in training]")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time of one training step of a recipe's stage, by part, on random images: needs no data."""
    from vitpipe.config.read import load_recipe
    from vitpipe.stages.launch import choose_threads, keep_freed_memory, share_the_cores

    loaded = load_recipe(recipe, profile, overrides or ())
    # As `vitpipe run` does it, before torch is imported.
    share_the_cores()
    keep_freed_memory()
    choose_threads(loaded)
    import torch

    from vitpipe.benchmarks.memory_modes import find_device
    from vitpipe.benchmarks.training_step import measure_step

    if threads:
        torch.set_num_threads(threads)
    times = measure_step(
        loaded,
        stage,
        batch=batch,
        rounds=rounds,
        device=find_device(device),
        num_classes=classes,
        say=tell,
    )
    if as_json:
        print_json(times)
        return
    print_rows(times.rows(), False, times.describe(), right=("median, ms", "fastest, ms", "share"))
    print("\n".join(times.notes()))


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
    rounds: Annotated[int, typer.Option(min=1, help="timed steps per memory mode")] = 5,
    device: DeviceOption = None,
    figure: Annotated[Path | None, typer.Option(help="write a figure of memory and time (.png)")] = None,
    error_figure: Annotated[
        Path | None, typer.Option(help="also measure the error over scales, and write a figure of it (.png)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Memory, time and accuracy of reversible columns, compared with plain autograd and checkpointing."""
    # Before the measurement, which takes minutes.
    for path in (figure, error_figure):
        check_figure(path)
    # Late imports, in every verb of this file: torch alone would exceed the 0.5 s of `vitpipe --help`.
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
    costs = measure_steps(setting, on, tell)
    errors = measure_scales(setting, on, say=tell) if error_figure else []
    with disk_errors(figure or error_figure or ""):
        if figure:
            save_png(draw_steps(costs, PAPER), figure)
        if error_figure:
            save_png(draw_errors(errors, PAPER), error_figure)
    if as_json:
        found = {"setting": setting, "device": str(on), "steps": costs, "scales": errors}
        print_json(found)
        return
    print_rows(step_rows(costs), False, setting.describe(on))
    print("\n".join(notes(costs)))


def data(
    images: Annotated[int, typer.Option(min=32, help="number of photographs")] = 256,
    quality: Annotated[
        int, typer.Option(min=50, max=100, help="JPEG quality of the photographs of 500 x 375 pixels")
    ] = 96,
    image_size: Annotated[int, typer.Option(min=16, help="pixels per side of the tensors")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="images per batch")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each loader; the median is reported")] = 5,
    figure: Annotated[
        Path | None, typer.Option(help="write a figure of throughput and shares (.png)")
    ] = None,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Throughput of reading shards, compared with torchvision's ImageFolder: same pixels, one core."""
    check_figure(figure)
    import torch

    from vitpipe.benchmarks import photographs
    from vitpipe.benchmarks.data_path import Setting, measure_paths, measure_shares
    from vitpipe.benchmarks.data_path_figures import describe, draw, path_rows, share_rows
    from vitpipe.report.figures import PAPER, save_png

    torch.set_num_threads(1)  # throughput is given per core
    wanted = photographs.Photographs(images, quality=quality)
    setting = Setting(wanted, image_size=image_size, batch=batch, num_rounds=rounds)
    if images < batch:
        raise InputError(
            f"{images} images do not fill a batch of {batch}", where="--images", fix=f"give at least {batch}"
        )
    with _scratch(scratch) as root:
        num_bytes = photographs.write(root / "train", wanted)
        # A packed dataset needs a validation split; its size does not matter here.
        photographs.write(root / "val", dataclasses.replace(wanted, number=10))
        speeds = measure_paths(root, setting, tell)
        shares = measure_shares(root, setting)
    with disk_errors(figure or ""):
        if figure:
            save_png(draw(speeds, shares, PAPER), figure)
    if as_json:
        print_json({"setting": setting, "mean_bytes": num_bytes / images, "paths": speeds, "steps": shares})
        return
    print_rows(path_rows(speeds), False, describe(setting, num_bytes / images))
    print_rows(share_rows(shares), False, "Fine-tuning input pipeline by step, ms per image")


def pack(
    counts: Annotated[
        list[int] | None,
        typer.Option("--count", help="number of small images; may be repeated  [default: 1000 10000 100000]"),
    ] = None,
    num_photographs: Annotated[
        int, typer.Option("--photographs", min=10, help="number, of 500 x 375 pixels")
    ] = 4000,
    workers: Annotated[int | None, typer.Option(min=0, help="processes  [default: one per core]")] = None,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Packing throughput and peak memory by number of images; `plan` uses the result."""
    import os

    from vitpipe.benchmarks.packing_speed import keep_speed, measure_packing

    chosen = tuple(counts or (1_000, 10_000, 100_000))
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    with _scratch(scratch) as root:
        costs = measure_packing(root, chosen, num_photographs, num_workers, tell)
    kept = keep_speed(costs)
    if as_json:
        print_json({"costs": costs, "kept": str(kept)})
        return
    rows = [
        {
            "images": cost.images,
            "number": format_count(cost.num_images),
            "time": format_duration(cost.seconds),
            "images/s": format_count(cost.images_per_second),
            "MB/s": f"{cost.megabytes_per_second:.1f}",
            "peak memory of the packer": format_bytes(cost.peak_packer_mb * _MB),
            "peak memory of the largest worker": format_bytes(cost.peak_worker_mb * _MB),
        }
        for cost in costs
    ]
    print_rows(rows, False, f"Packing with {counted(num_workers, 'process', 'processes')}")
    print(with_typed_commands(f"`vitpipe plan` now uses the speed of this machine, stored in {kept}"))


def index(
    entries: Annotated[
        int, typer.Option(min=4096, help="images of the synthetic dataset; at least one global batch")
    ] = 14_000_000,
    classes: Annotated[int, typer.Option(min=1, help="classes of the synthetic dataset")] = 21_841,
    rounds: Annotated[int, typer.Option(min=1, help="measurements, each in a new process")] = 3,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory to open an index of millions of images and to shuffle an epoch.

    The default is the size of ImageNet-22K.
    """
    from vitpipe.benchmarks.index_scale import measure_index, write_synthetic_set

    with _scratch(scratch) as root:
        tell(f"writing an index of {format_count(entries)} images")
        write_synthetic_set(root, entries, classes)
        costs = measure_index(root, rounds, tell)
    if as_json:
        print_json(costs)
        return
    rows = [
        {
            "shards": format_count(cost.num_shards),
            "index": format_bytes(cost.index_mb * _MB),
            # In seconds with decimals: format_duration rounds to tenths, and these are milliseconds.
            "open, s": f"{cost.open_seconds:.3f}",
            "shuffle, s": f"{cost.shuffle_seconds:.2f}",
            "100 steps in mid-epoch, s": f"{cost.steps_seconds:.2f}",
            "peak memory": format_bytes(cost.peak_mb * _MB),
            "of it imports": format_bytes(cost.imports_mb * _MB),
        }
        for cost in costs
    ]
    print_rows(rows, False, f"Index of {format_count(entries)} images")


@contextmanager
def _scratch(given: Path | None) -> Iterator[Path]:
    """An empty folder that is removed afterwards.

    Raises:
        StorageError: when the disk refuses a write.
    """
    with disk_errors(given or tempfile.gettempdir()):
        if given is not None:
            given.mkdir(parents=True, exist_ok=True)
        # A folder inside the given one: what the user has there stays.
        with tempfile.TemporaryDirectory(prefix="vitpipe-benchmark-", dir=given) as folder:
            yield Path(folder)
