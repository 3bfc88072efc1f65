"""Images per second of several classifiers, timed in turn in one run, and their ratios.

Speeds that are measured one network after the other differ by what else the machine does meanwhile, a GPU's
clock included. Here every round times one forward pass of each network, and a ratio is of two passes of the
same round:

    networks > [a pass of each] x rounds > median of each, median of the ratios to the first
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vitpipe.config.model import named_config
from vitpipe.config.resolve import Precision
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import counted
from vitpipe.models.build import build_classifier
from vitpipe.train.precision import autocast

_NUM_WARM_UP = 3  # memory is allocated, kernels are chosen, clocks rise
_NUM_CLASSES = 1000


@dataclass(frozen=True)
class NetworkSpeed:
    """One network's speed.

    Attributes:
        images_per_second: by the median of the rounds.
        ratio: median over the rounds of its speed relative to the first network's.
        ratio_low: lower quartile of the same.
        ratio_high: upper quartile.
    """

    model: str
    images_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


@torch.inference_mode()
def measure_networks(
    names: Sequence[str],
    *,
    image_size: int,
    batch: int,
    rounds: int,
    device: torch.device,
    precision: Precision = "off",
    say: Callable[[str], None] = lambda text: None,
) -> list[NetworkSpeed]:
    """Speed of classifiers with 1000 classes and random weights, and relative to the first.

    Args:
        names: registered networks; the first is what the others are compared with.
        image_size: H = W in pixels.
        batch: images of a pass.
        rounds: timed passes of each network.
        precision: of the forward pass; weights stay float32.

    Raises:
        InputError: when fewer than two different networks are named, or one cannot take this size.
        RecipeError: when there is no such network.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(
            f"{counted(len(names), 'network')} named, {len(set(names))} of them different",
            where="MODELS",
            fix="name two or more different ones, for example vit_base hivit_base",
        )
    configs = [named_config(name, image_size) for name in names]
    networks = [build_classifier(c, num_classes=_NUM_CLASSES).eval().to(device) for c in configs]
    images_BCHW = torch.randn(batch, 3, image_size, image_size, device=device)
    say(f"{counted(rounds, 'round')} of {', '.join(names)}")
    seconds: list[list[float]] = []
    for number in range(_NUM_WARM_UP + rounds):
        # Backwards in every second round, so that none always runs behind the same other one.
        order = range(len(networks)) if number % 2 == 0 else reversed(range(len(networks)))
        timed = {index: _pass_seconds(networks[index], images_BCHW, precision) for index in order}
        seconds.append([timed[index] for index in range(len(networks))])
    return [
        _speed(name, [(timed[0], timed[index]) for timed in seconds[_NUM_WARM_UP:]], batch)
        for index, name in enumerate(names)
    ]


def _pass_seconds(network: nn.Module, images_BCHW: torch.Tensor, precision: Precision) -> float:
    device = images_BCHW.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously: without this only launches are timed
    begun = time.perf_counter()
    with autocast(device, precision):
        network(images_BCHW)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _speed(name: str, pairs: Sequence[tuple[float, float]], batch: int) -> NetworkSpeed:
    """Of pairs of the first network's seconds and its own."""
    ratios = [first / own for first, own in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return NetworkSpeed(
        model=name,
        images_per_second=batch / statistics.median(own for _, own in pairs),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )
