"""Build optimisers over parameter groups, and set their learning rate and weight decay."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vitpipe.config.train_sections import OptimConfig

if TYPE_CHECKING:
    from timm.optim.lars import Lars


# The step without its wrapper, which imports torch.compile's 700 modules to ask whether it is being compiled.
_PLAIN_STEP = inspect.unwrap(torch.optim.AdamW.step)
_PLAIN_SGD_STEP = inspect.unwrap(torch.optim.SGD.step)


def _spare_the_compiler() -> None:
    """Let the methods that torch hides from its compiler not import it to do so (torch/_compile.py).

    What nothing has imported needs no hiding: the methods then stand in their own place. None of them is
    called within a compiled function here.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        # The name that torch looks up. If a version renames it, nothing but time is lost.
        if hidden := getattr(method, "__wrapped__", None):
            hidden.__dynamo_disable = hidden


class _AdamW(torch.optim.AdamW):
    """torch's AdamW without torch.compile: importing it takes 2 to 3 s, in every training process."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        _spare_the_compiler()
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return _PLAIN_STEP(self, closure)


class PlainSGD(torch.optim.SGD):
    """torch's SGD without torch.compile, as `_AdamW`."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        _spare_the_compiler()
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As torch's."""
        return _PLAIN_SGD_STEP(self, closure)


def build_optimiser(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`."""
    build = {"adamw": build_adamw, "lars": build_lars, "sgd": build_sgd}[optim.name]
    return build(groups, optim)


def build_adamw(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`."""
    # Fused on a CPU, too: one pass over the memory instead of a dozen.
    # lr 0 until `set_learning_rate`, which the loop calls before every step.
    return _AdamW(list(groups), lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def build_sgd(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.SGD:
    """Stochastic gradient descent with momentum over `parameter_groups`, as in DINO's linear probe."""
    return PlainSGD(list(groups), lr=0.0, momentum=optim.momentum)


def build_lars(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> Lars:
    """LARS (You, Gitman and Ginsburg, arXiv 1708.03888) as in MAE's linear probe.

    The learning rate of a matrix is scaled by trust coefficient * |weights| / |gradient|; vectors (norms,
    biases) learn by plain momentum.
    """
    # timm imports all its networks and torch's compiler: 2 s that no other optimiser needs.
    from timm.optim.lars import Lars

    # timm adapts only groups that decay, unless told so. The probe has weight decay 0, and its matrix must
    # still be adapted; with `always_adapt` on vectors too, biases would be scaled by their own tiny norm.
    adapted = [
        {**group, "always_adapt": any(parameter.ndim > 1 for parameter in group["params"])}
        for group in groups
    ]
    # eps 0: MAE's formula has none, and timm takes a ratio of 1 where a norm is 0.
    return Lars(adapted, lr=0.0, momentum=optim.momentum, trust_coeff=optim.trust_coefficient, eps=0.0)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimiser: torch.optim.Optimizer, weight_decay: float) -> None:
    """Give this weight decay to every group that decays (`decays`)."""
    for group in optimiser.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay
