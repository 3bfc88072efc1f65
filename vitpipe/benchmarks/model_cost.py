"""Cost of a network: parameters, multiply-adds and stored activations, counted exactly.

The network is built and run on torch's meta device, which computes shapes only: a large network at a large
image size takes a second and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitpipe.config.model import find_model, named_config
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import format_billions, format_bytes, format_millions
from vitpipe.models.build import build_classifier
from vitpipe.models.network import Pretrainer

# Every number names its convention: published "FLOPs" differ by a factor of two and by what they leave out.
CONVENTIONS = {
    "params": "parameters, frozen ones too",
    "macs": "MACs: multiply-adds in conv, linear, attention products; one image, forward",
    # iTPN's table 13 fits this convention within 0.4 %.
    "module_flops": "FLOPs as counted by MMCV's counter: per module, one multiply-add is one FLOP, norms "
    "count two per element, conv biases, ReLU and pooling one, linear biases, attention products and GELU "
    "none; one image, forward",
    "activation_bytes": "bytes kept for the backward pass: one image, float32, attention not fused",
}


@dataclass(frozen=True)
class Cost:
    """The cost of one image; `CONVENTIONS` defines each number.

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
        """One row per number: name, value, convention."""
        return [
            {"name": name, "value": getattr(self, name), "convention": text}
            for name, text in CONVENTIONS.items()
        ]

    def shown_rows(self) -> list[dict[str, str]]:
        """The same for people: every value with its unit."""
        values = {
            "params": format_millions(self.params),
            "macs": format_billions(self.macs),
            "module_flops": format_billions(self.module_flops),
            "activation_bytes": format_bytes(self.activation_bytes),
        }
        return [
            {"name": name, "value": values[name], "convention": text} for name, text in CONVENTIONS.items()
        ]


def measure_cost(build: Callable[[], nn.Module], image_size: int | tuple[int, int]) -> Cost:
    """The cost of the network that `build` returns, in training mode.

    Args:
        build: returns a classifier or a `Pretrainer`; called once, on the meta device, so it must not depend
            on values of tensors.
        image_size: pixels, one side of a square or (height, width).

    Raises:
        InputError: when the network does not accept that size.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):
        model = build()
        images_BCHW = torch.empty(1, 3, height, width)
        inputs: tuple[Tensor, ...] = (images_BCHW,)
        if isinstance(model, Pretrainer):
            inputs = (images_BCHW, torch.empty(1, model.num_units))
    with (
        # Attention as two matrix products: the FLOP counter misses the fused kernel of a CPU (ViT-S: 4.24
        # instead of 4.60 GMACs).
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        _count_modules(model) as module_flops,
        _count_saved(model) as activation_bytes,
    ):
        model(*inputs)
    return Cost(
        image_size=(height, width),
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,  # torch counts a multiply-add as two
        module_flops=sum(module_flops),
        activation_bytes=sum(activation_bytes.values()),
    )


def cost_of(name: str, *, image_size: int | tuple[int, int] | None = None, num_classes: int = 1000) -> Cost:
    """The cost of the classifier of a registered network.

    Args:
        name: one of `vitpipe models`.
        image_size: pixels, one side of a square or (height, width); the published size if not given.

    Raises:
        RecipeError: when there is no such network.
        InputError: when the network does not accept the size.
    """
    size = image_size or find_model(name).image_size
    height, width = (size, size) if isinstance(size, int) else size
    model = named_config(name, height)
    if height != width and not model.takes_any_size:
        raise InputError(
            f"{name} takes square images only", where="--image-size", fix="give one side, for example 224"
        )
    return measure_cost(lambda: build_classifier(model, num_classes=num_classes), (height, width))


# As in MMCV's counter, which also knows one and three dimensions. It sees no GELU, and no synchronised batch
# norm; detectors are counted with the plain one, so that machines without a GPU can.
_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
_ONE_PER_ELEMENT = (
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)


@contextmanager
def _count_modules(model: nn.Module) -> Iterator[list[int]]:
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # A weight acts once per position: of the output, or of the input where that is the smaller map.
            acting = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            bias = 0 if module.bias is None else output.numel()
            counts.append(acting[:, 0].numel() * module.weight.numel() + bias)
        elif isinstance(module, _NORMS):
            counts.append(inputs[0].numel() * (1 if module.weight is None else 2))
        else:
            counts.append(inputs[0].numel())

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, *_NORMS, *_ONE_PER_ELEMENT))
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves, by address; without parameters and buffers."""
    # By storage: a tensor that two operators save, or several views of one, takes its memory once.
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
