"""What a network costs: parameters, multiply-adds, stored activations; counted, not estimated.

The network is built on torch's meta device: shapes flow through it, no numbers, so a large network at a large
size takes a second and no memory. There, attention is always taken apart into its two products, which a
count on a CPU or GPU misses when a fused kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitpipe.config.recipe import ModelConfig
from vitpipe.models.build import build_classifier
from vitpipe.models.network import Pretrainer
from vitpipe.models.registry import find_model

CONVENTIONS = {
    "params": "parameters, frozen ones too",
    "macs": "MACs: multiply-adds in conv, linear, attention products; one image, forward",
    "module_flops": "FLOPs as the old MMCV counter has them: per module, one multiply-add is one FLOP, norms "
    "count two per element, conv biases one, linear biases, attention products and activation functions "
    "none; one image, forward",
    "activation_bytes": "bytes kept for the backward pass: one image, float32, attention not fused",
}


@dataclass(frozen=True)
class Cost:
    """The cost of one image. What each number means is in `CONVENTIONS`.

    Attributes:
        image_size: height and width in pixels.
    """

    image_size: tuple[int, int]
    params: int
    macs: int
    module_flops: int
    activation_bytes: int

    @property
    def gmacs(self) -> float:
        """`macs` in units of 10^9."""
        return self.macs / 1e9

    def table(self) -> list[dict[str, str | int]]:
        """One row per number, with its convention."""
        return [
            {"name": name, "value": getattr(self, name), "convention": text}
            for name, text in CONVENTIONS.items()
        ]


def measure_cost(build: Callable[[], nn.Module], image_size: int | tuple[int, int]) -> Cost:
    """Count a network that `build` makes, in training mode as it is built.

    Args:
        build: makes the network; called once, under the meta device, so it must not read numbers.
        image_size: pixels, one side of a square or (height, width).

    Raises:
        InputError: when the network does not take that size.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):
        model = build()
        images_BCHW = torch.empty(1, 3, height, width)
        inputs: tuple[Tensor, ...] = (images_BCHW,)
        if isinstance(model, Pretrainer):
            inputs = (images_BCHW, torch.empty(1, model.num_units))
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        _count_modules(model) as module_flops,
        _count_saved(model) as activation_bytes,
    ):
        model(*inputs)
    return Cost(
        image_size=(height, width),
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        module_flops=sum(module_flops),
        activation_bytes=sum(activation_bytes.values()),
    )


def cost_of(name: str, *, image_size: int | None = None, num_classes: int = 1000) -> Cost:
    """The classifier of a registered network as published, at any size that it takes.

    Raises:
        RecipeError: when there is no such network.
        InputError: when the size does not fit.
    """
    size = image_size or find_model(name).image_size
    model = ModelConfig(name=name, image_size=size)
    return measure_cost(lambda: build_classifier(model, num_classes=num_classes), size)


@contextmanager
def _count_modules(model: nn.Module) -> Iterator[list[int]]:
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)
        elif isinstance(module, nn.Conv2d):
            bias = 0 if module.bias is None else 1
            counts.append(output.numel() * (module.weight[0].numel() + bias))
        else:
            counts.append(2 * output.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of everything autograd keeps, parameters and buffers left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
