"""The verbs of `benchmark` that measure one network, or a part of one, beside another form of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.units import counted, format_bytes
from vitpipe.verbs.completion import complete_model, complete_profile, complete_recipe
from vitpipe.verbs.options import JsonOption, SetOption
from vitpipe.verbs.show import print_rows

if TYPE_CHECKING:
    from vitpipe.benchmarks.cluster_attention import StepCost
    from vitpipe.benchmarks.information_leak import MaskedNetwork
    from vitpipe.config.resolve import Precision

DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1  [default: a GPU if there is one]")]


def propagation(
    rows: Annotated[int, typer.Option(min=1, help="rows of patches")] = 30,
    columns: Annotated[int, typer.Option(min=1, help="columns of patches")] = 52,
    width: Annotated[int, typer.Option(min=1, help="channels of a feature")] = 384,
    rounds: Annotated[int, typer.Option(min=1, help="timed frames with a full context")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch on a CPU")] = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time of label propagation (stage video) per frame, compared with the whole affinity matrix.

    The defaults are a frame of DAVIS at 480 x 832 pixels in ViT-S/16.
    """
    _as_in_training()
    import torch

    from vitpipe.benchmarks.memory_modes import find_device
    from vitpipe.benchmarks.propagation_speed import measure_propagation
    from vitpipe.evaluate.propagate import PropagationSettings

    torch.set_num_threads(threads)
    settings, place = PropagationSettings(), find_device(device)
    found = measure_propagation((rows, columns), width, settings, rounds, place, tell)
    if as_json:
        print_json({"device": str(place), "ratio": found.ratio, "times": found})
        return
    pairs = {"strips (stage video)": found.strips_seconds, "whole matrix": found.matrix_seconds}
    table = [{"way": way, "ms per frame": f"{1e3 * seconds:.1f}"} for way, seconds in pairs.items()]
    print_rows(table, False, f"{rows} x {columns} patches of {width} channels, 8 context frames, {place}")
    print(f"ratio {found.ratio:.2f}, largest difference of the labels {found.largest_difference:.1e}")


def clusters(
    model: Annotated[
        str, typer.Argument(help="a PaCa network without a teacher", autocompletion=complete_model)
    ] = "paca_tiny",
    sizes: Annotated[
        list[int] | None,
        typer.Option("--image-size", min=32, help="pixels per side; may be repeated  [default: 224 448 896]"),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(min=1, help="images of the largest size; of smaller ones as many as have its pixels"),
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="timed steps of each form at each size")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch on a CPU")] = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of PaCa's training step per patch, by image size, beside a plainly written form."""
    _as_in_training()
    import torch

    from vitpipe.benchmarks.cluster_attention import batch_of, measure_clusters
    from vitpipe.benchmarks.memory_modes import find_device
    from vitpipe.config.model import named_config
    from vitpipe.models.paca.config import PacaConfig

    chosen = named_config(model)
    if not isinstance(chosen, PacaConfig) or chosen.has_teacher:
        raise InputError(
            f"'{model}' is no PaCa network without a teacher",
            where="MODEL",
            fix="name for example paca_small",
        )
    torch.set_num_threads(threads)
    wanted = sorted(sizes or (224, 448, 896))
    place = find_device(device)
    found = measure_clusters(
        chosen,
        {size: batch_of(size, wanted[-1], batch) for size in wanted},
        rounds=rounds,
        device=place,
        say=tell,
    )
    if as_json:
        print_json({"device": str(place), "model": model, "steps": found})
        return
    _print_clusters(model, str(place), found)


def _print_clusters(model: str, place: str, found: Sequence[StepCost]) -> None:
    """Table of all steps, ratios of the two forms, and how flat ours is over the sizes."""
    ours, plain = (found[first::2] for first in (0, 1))
    rows = [
        {
            "image": f"{cost.image_size} px",
            "batch": cost.batch,
            "form": cost.form,
            "s per step": f"{cost.seconds:.3f}",
            "us per patch": f"{1e6 * cost.seconds / cost.patches:.2f}",
            "peak": format_bytes(cost.peak_bytes),
            "bytes per patch": f"{cost.peak_bytes / cost.patches:,.0f}",
        }
        for cost in found
    ]
    print_rows(rows, False, f"Training step of {model} on {place}, patches of the first stage")
    for own, other in zip(ours, plain, strict=True):
        print(
            f"{own.image_size} px: {own.seconds / other.seconds:.2f} of the plain form's time, "
            f"{own.peak_bytes / other.peak_bytes:.2f} of its memory"
        )
    if len(ours) > 1:
        for what, values in (
            ("time", [cost.seconds / cost.patches for cost in ours]),
            ("memory", [cost.peak_bytes / cost.patches for cost in ours]),
        ):
            print(f"{what} per patch: the largest is {max(values) / min(values):.2f} of the smallest")


def drloc(
    recipe: Annotated[
        str, typer.Argument(help="one that trains by method drloc", autocompletion=complete_recipe)
    ] = "drloc/swin_tiny/cifar100/drloc/scratch/100",
    profile: Annotated[str, typer.Option(help="demo, full, ...", autocompletion=complete_profile)] = "full",
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="timed pairs of a plain step and the loss alone")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch on a CPU")] = 1,
    overrides: SetOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time of drloc's loss, compared with the training step that it is added to: needs no data."""
    _as_in_training()
    import torch

    from vitpipe.benchmarks.location_loss import measure_location_loss
    from vitpipe.benchmarks.memory_modes import find_device
    from vitpipe.config.read import load_recipe

    torch.set_num_threads(threads)
    loaded = load_recipe(recipe, profile, overrides or ())
    found = measure_location_loss(loaded, batch=batch, rounds=rounds, device=find_device(device), say=tell)
    if as_json:
        print_json(found)
        return
    pairs = {"step without the loss": found.plain_seconds, "loss, forward and backward": found.loss_seconds}
    table = [{"part": part, "median, ms": f"{1e3 * seconds:.1f}"} for part, seconds in pairs.items()]
    print_rows(table, False, found.describe(), right=("median, ms",))
    print(f"loss / step {found.ratio:.2%}, quartiles {found.ratio_low:.2%} to {found.ratio_high:.2%}")


def _as_in_training() -> None:
    """Threads and memory as a stage has them; before torch is imported."""
    from vitpipe.stages.launch import keep_freed_memory, share_the_cores

    share_the_cores()
    keep_freed_memory()


def throughput(
    models: Annotated[
        list[str],
        typer.Argument(
            help="two or more; the others are compared with the first", autocompletion=complete_model
        ),
    ],
    image_size: Annotated[int, typer.Option(min=16, help="pixels per side")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="images of a forward pass")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="timed passes of each network, in turn")] = 20,
    precision: Annotated[str, typer.Option(help="off (float32), bf16 or fp16")] = "off",
    threads: Annotated[int, typer.Option(min=1, help="threads of torch on a CPU")] = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Images per second of several networks' classifiers, timed in turn in one run, and their ratios."""
    _as_in_training()
    from typing import get_args

    import torch

    from vitpipe.benchmarks.memory_modes import find_device
    from vitpipe.benchmarks.network_speed import measure_networks
    from vitpipe.config.resolve import Precision

    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise InputError(f"'{precision}' is no precision", where="--precision", fix=f"choose one of {known}")
    torch.set_num_threads(threads)
    place = find_device(device)
    found = measure_networks(
        models,
        image_size=image_size,
        batch=batch,
        rounds=rounds,
        device=place,
        precision=cast("Precision", precision),
        say=tell,
    )
    if as_json:
        setting = {"image_size": image_size, "batch": batch, "rounds": rounds, "precision": precision}
        print_json({"device": str(place), "threads": threads, **setting, "networks": found})
        return
    rows = [
        {
            "network": speed.model,
            "images/s": f"{speed.images_per_second:.2f}",
            f"to {models[0]}": f"{speed.ratio:.3f}",
            "quartiles": f"{speed.ratio_low:.3f} to {speed.ratio_high:.3f}",
        }
        for speed in found
    ]
    where = str(place) if place.type == "cuda" else counted(threads, "thread")
    title = f"{image_size} pixels, batch {batch}, {counted(rounds, 'round')}, precision {precision}, {where}"
    print_rows(rows, False, title)


def leak(
    model: Annotated[
        str, typer.Argument(help="a HiViT, for example hivit_base", autocompletion=complete_model)
    ] = "hivit_base",
    supervision: Annotated[
        str, typer.Option(help="pixels (visible units only), or features (of a teacher such as CLIP)")
    ] = "pixels",
    image_size: Annotated[int, typer.Option(min=16, help="pixels per side, a multiple of 16")] = 224,
    mask_ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of the units to hide")] = 0.75,
    seed: Annotated[int, typer.Option(help="of weights and mask")] = 0,
    figure: Annotated[
        Path | None, typer.Option(help="write a figure of the units that change (.png)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which features of a masked network change when hidden pixels do, beside networks with known faults.

    Exit code 1 when hidden pixels reach anything in the network itself.
    """
    check_figure(figure)
    import torch

    from vitpipe.benchmarks import information_leak_figures as figures
    from vitpipe.models.masking import choose_units
    from vitpipe.report.figures import PAPER, save_png

    torch.manual_seed(seed)
    network, released = _masked_network(model, supervision, image_size, mask_ratio)
    images_BCHW = figures.photograph(image_size)
    noise_BN = torch.rand(1, (image_size // 16) ** 2, generator=torch.Generator().manual_seed(seed))
    mask_BN = choose_units(noise_BN, mask_ratio).mask_BN
    found = figures.measure_forms(network, released, images_BCHW, mask_BN)
    with disk_errors(figure or ""):
        if figure:
            save_png(figures.draw_leaks(found, images_BCHW, mask_BN, PAPER), figure)
    hidden = int(mask_BN.sum())
    if as_json:
        forms = [
            {"form": form, "leaks": {change.feature: change.num_leaks for change in changes}}
            for form, changes in found.items()
        ]
        print_json({"model": model, "units": mask_BN.numel(), "hidden": hidden, "forms": forms})
    else:
        title = f"{model}, {supervision}, {hidden} of {mask_BN.numel()} units hidden: units that leak"
        print_rows(figures.leak_rows(found), False, title)
    if any(change.num_leaks for change in found[figures.AS_BUILT]):
        raise typer.Exit(1)


def _masked_network(
    name: str, supervision: str, image_size: int, mask_ratio: float
) -> tuple[MaskedNetwork, MaskedNetwork | None]:
    """The pre-training network, and the same one as released where that differs.

    Raises:
        InputError: for another supervision or a network without a pyramid, or as `MaskedPretrainer`.
    """
    import copy

    from vitpipe.config.model import named_config
    from vitpipe.models.families import family_of
    from vitpipe.models.hivit.config import HiViTConfig
    from vitpipe.models.masking import check_mask_ratio, units_per_side

    if supervision not in ("pixels", "features"):
        raise InputError(
            f"'{supervision}' is no supervision", where="--supervision", fix="name pixels or features"
        )
    num_units = units_per_side(image_size) ** 2
    chosen = named_config(name, image_size)
    if not isinstance(chosen, HiViTConfig):
        raise InputError(
            f"'{name}' has no pyramid that is pre-trained", where="MODEL", fix="name for example hivit_base"
        )
    check_mask_ratio(num_units, mask_ratio)
    family: Any = family_of(chosen)
    if supervision == "pixels":
        return family.pretrainer(chosen, mask_ratio=mask_ratio), None
    network = family.feature_predictor(chosen, target_width=512, drop_path=0.0, aligned=True)
    released = copy.deepcopy(network)
    released.aligned = False
    return network, released


# In the order in which `vitpipe benchmark --help` lists them.
OF_NETWORKS = (throughput, propagation, clusters, drloc, leak)


def print_json(found: Any) -> None:
    """Print plain values and dataclasses as JSON."""
    text = json.dumps(found, default=dataclasses.asdict)
    # RFC 8259 has no Infinity or NaN, which an error can be and which json.dumps would write: they become
    # null.
    print(json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2))


def tell(text: str) -> None:
    """Say on stderr what is being measured."""
    print(f"measuring {text}", file=sys.stderr, flush=True)


def check_figure(path: Path | None) -> None:
    """Refuse a figure that cannot be written, before anything is measured.

    Raises:
        InputError: when the name does not end in .png, or there is a file that is no figure of vitpipe.
    """
    if path is None:
        return
    if path.suffix != ".png":
        raise InputError(
            f"'{path}' is not the name of a PNG file", where="--figure", fix="choose a name that ends in .png"
        )
    from vitpipe.report.figures import is_own_png

    if (path.exists() or path.is_symlink()) and not is_own_png(path):
        raise InputError(
            f"'{path}' exists and is no figure of vitpipe; nothing was written",
            where="--figure",
            fix="choose another name",
        )
