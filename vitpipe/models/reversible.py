"""Chains of reversible columns: the backward pass rebuilds activations instead of keeping them.

Reversible Column Networks; Yuxuan Cai, Yizhuang Zhou, Qi Han, Jianjian Sun, Xiangwen Kong, Jun Li, Xiangyu
Zhang; arXiv 2212.11696, section 3 (the coupling of columns); RevColV2: Exploring Disentangled
Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang; arXiv 2309.01005.

A column has S levels. With its input x, the states u of the column before it and its own states y, in
processing order s = 0 ... S-1 and with y_-1 = x:

    forward     y_s = F_s(y_s-1, u_s+1 ...) + scale_s * u_s         (without u in a first column: F_s(y_s-1))
    inverse     u_s = (y_s - F_s(y_s-1, u_s+1 ...)) / scale_s       s = S-1 ... 0, so that u_s+1 is known

Every column gets the same x. Three memory modes, all with the gradients of ordinary autograd:

    plain        autograd keeps all activations
    column       the inputs of each column are kept, its inside is recomputed (the same bits)
    reversible   x and the states of the last column are kept, whatever the number of columns

The inverse divides by the scales, so its error grows as they shrink; `memory_mode.py` has the limits. Memory
and step time of each mode: docs/reversible.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vitpipe.models import draws

MemoryMode = Literal["plain", "column", "reversible"]
States = tuple[Tensor, ...]
# The place in the draws of images, then the state of each random number generator, CPU first.
_Randomness = tuple[draws.Place, tuple[Tensor, ...]]
_Precision = Callable[[], AbstractContextManager[Any]]

# It prevents a division by 0, nothing more: at 1e-3 the rebuilt states are noise, and
# `memory_mode.safe_scale` has switched to mode `column` long before.
SMALLEST_SCALE = 1e-3
"""Scales are kept at least this far from 0 (the bound of the released RevCol code)."""


class Column(nn.Module, ABC):
    """One column of a chain.

    A level is run twice in a training step. So it must have no side effects (no batch norm) and draw random
    numbers from `draws` or torch's generators only, whose states are restored before the second run.
    """

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """S."""

    @abstractmethod
    def level(self, position: int) -> nn.Module:
        """F_s: a module called with (y_s-1, (u_s+1, ..., u_S-1)), the tuple empty in a first column."""

    @abstractmethod
    def scales(self) -> tuple[nn.Parameter, ...]:
        """The S scales in processing order, each broadcastable to its state; empty in a first column."""


def run_chain(
    columns: Sequence[Column],
    x: Tensor,
    states: States | None = None,
    *,
    mode: MemoryMode = "plain",
    num_positions: Sequence[int] | None = None,
) -> States:
    """Run columns one after the other and return the states of the last one, in processing order.

    Args:
        columns: at least one.
        x: input of every column.
        states: u of the first column; `None` if it has no scales.
        mode: memory mode; without gradients no mode keeps anything.
        num_positions: per column, how many positions to run, where later ones are not needed. Such a chain
            cannot be inverted.

    Raises:
        ValueError: without columns, or when positions are left out in mode `reversible`.
    """
    if not columns:
        raise ValueError("a chain needs at least one column")
    lengths = num_positions or [column.num_levels for column in columns]
    if mode == "reversible" and num_positions is not None:
        raise ValueError("a chain with positions left out cannot be inverted")
    # States, products with scales and the division stay in float32 under autocast; only F runs in the lower
    # precision. Its output is converted to x's type, so x sets the type of the whole chain.
    if autocasts(x.device):
        x = x.float()
    # Not collected for `plain`: walking through the modules takes 2 ms.
    parameters = _trainable(columns) if mode != "plain" else ()
    inputs = (x, *(states or ()), *parameters)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        # Nothing to differentiate: skips the copies of generator states and autograd's bookkeeping.
        mode = "plain"
    if mode == "reversible":
        return _ReversibleChain.apply(columns, len(states or ()), x, *(states or ()), *parameters)
    # Not reentrant: the reentrant form gives no gradients where no input requires one. torch restores
    # generators and autocast for the second run.
    run = _run_column
    if mode == "column":
        run = partial(checkpoint, _run_column, use_reentrant=False, context_fn=draws.checkpoint_contexts)
    for column, length in zip(columns, lengths, strict=True):
        states = run(column, x, states, length)
    assert states is not None
    return states


def _run_column(
    column: Column,
    x: Tensor,
    states: States | None,
    num_positions: int,
    drawn: list[_Randomness | None] | None = None,
) -> States:
    """The forward equation for positions 0 ... `num_positions` - 1.

    `drawn` gets one entry per level: the randomness before it if it drew random numbers, else `None`.
    """
    scales = column.scales()
    outputs: list[Tensor] = []
    for position in range(num_positions):
        below = outputs[-1] if outputs else x
        above = () if states is None else states[position + 1 :]
        before = None if drawn is None else _randomness(x.device)
        output = column.level(position)(below, above).to(x.dtype)
        if drawn is not None and before is not None:
            after = _randomness(x.device)
            # A generator's state is 5 kB on a CPU; it is kept only for levels that drew (drop path in
            # training).
            same = all(torch.equal(old, new) for old, new in zip(before[1], after[1], strict=True))
            drawn.append(None if same and before[0] == after[0] else before)
        outputs.append(output if states is None else output + scales[position] * states[position])
    return tuple(outputs)


class _ReversibleChain(torch.autograd.Function):
    """The whole chain as one autograd function."""

    # Every trainable parameter is an input and its gradient is returned, so that accumulation, gradient
    # scalers, clipping, hooks and DistributedDataParallel work as usual. The released RevCol code calls
    # backward inside backward and lets parameters accumulate gradients there, out of sight of these.

    @staticmethod
    def forward(ctx: Any, columns: Sequence[Column], num_states: int, x: Tensor, *tensors: Tensor) -> States:
        states: States | None = tensors[:num_states] or None
        ctx.columns, ctx.num_states, ctx.drawn = columns, num_states, []
        ctx.parameters = tensors[num_states:]
        # The backward usually runs outside the forward's autocast context; F must see the same settings
        # there.
        ctx.precision = _precision(x.device)
        for column in columns:
            drawn: list[_Randomness | None] = []
            with ctx.precision():
                states = _run_column(column, x, states, column.num_levels, drawn)
            ctx.drawn.append(drawn)
        assert states is not None
        # All activations that are kept: 5 tensors (B, N, C) per chain of four levels.
        ctx.save_for_backward(x, *states)
        return states

    # The backward is not itself recorded; without this mark second derivatives would silently be wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        outputs: States = tuple(kept)
        total = _Gradients(ctx.needs_input_grad[2])
        with _randomness_kept(x.device):
            for column, drawn in zip(reversed(ctx.columns), reversed(ctx.drawn), strict=True):
                outputs, grads = _undo_column(column, x, outputs, grads, drawn, ctx.precision, total)
        # `None` for a parameter that got no gradient, as in ordinary autograd: zeros would let AdamW decay
        # it.
        of_states = grads if ctx.num_states else ()
        of_parameters = [total.parameters.get(id(parameter)) for parameter in ctx.parameters]
        return (None, None, total.x, *of_states, *of_parameters)


class _Gradients:
    """Sums over the columns: the gradients of x and, by identity, of the parameters.

    x enters every column, and a parameter may be used in several.
    """

    def __init__(self, wants_x: bool) -> None:
        self.wants_x = wants_x
        self.x: Tensor | None = None
        self.parameters: dict[int, Tensor] = {}

    def add_x(self, grad: Tensor | None) -> None:
        if grad is not None:
            self.x = grad if self.x is None else self.x + grad

    def add(self, parameter: nn.Parameter, grad: Tensor | None) -> None:
        if grad is not None:
            known = self.parameters.get(id(parameter))
            self.parameters[id(parameter)] = grad if known is None else known + grad


def _undo_column(
    column: Column,
    x: Tensor,
    outputs: States,
    grads: States,
    drawn: list[_Randomness | None],
    precision: _Precision,
    total: _Gradients,
) -> tuple[States, States]:
    """Invert one column and run its backward: from y and its gradients to u and its gradients.

    Adds the gradients of x and of the parameters to `total`. Returns empty tuples for a first column.
    """
    # Order S-1 ... 0 is needed for both: position s needs the rebuilt u_s+1 ..., and the gradient of y_s is
    # complete only when position s+1 has added its share.
    scales = column.scales()
    grad_of = list(grads)
    above: States = ()
    grads_above: list[Tensor] = []
    for position in reversed(range(column.num_levels)):
        below = outputs[position - 1] if position else x
        level = column.level(position)
        wants_below = bool(position) or total.wants_x
        leaves = [_leaf(below, wants_below), *(_leaf(state, True) for state in above)]
        # The level runs on stand-ins of its parameters: a hook on a parameter then runs once, when the
        # gradient of the whole chain arrives, and not here too.
        own = dict(level.named_parameters())
        stand_ins = {name: _leaf(parameter, parameter.requires_grad) for name, parameter in own.items()}
        # The same drop-path decisions as in the forward, or branch and gradient would be another network's.
        _restore(drawn[position], x.device)
        with torch.enable_grad(), precision():
            branch = functional_call(level, stand_ins, (leaves[0], tuple(leaves[1:]))).to(x.dtype)
        of_below, *found = _gradients(branch, [*leaves, *stand_ins.values()], grad_of[position])
        cross, of_parameters = found[: len(above)], found[len(above) :]
        for parameter, grad in zip(own.values(), of_parameters, strict=True):
            total.add(parameter, grad)
        if position == 0:
            total.add_x(of_below)
        elif of_below is not None:
            grad_of[position - 1] = grad_of[position - 1] + of_below
        # With branch = F_s: u_s = (y_s - branch) / scale; dL/dscale = grad * u_s, summed over batch and
        # tokens; dL/du_s = scale * grad now, plus the share of F at lower positions, which comes as `cross`
        # there.
        if scales:
            scale, grad = scales[position], grad_of[position]
            state = (outputs[position] - branch.detach()) / scale
            if scale.requires_grad:
                total.add(scale, (grad * state).sum_to_size(scale.shape))
            pairs = zip(grads_above, cross, strict=True)
            grads_above = [scale * grad, *(old if new is None else old + new for old, new in pairs)]
            above = (state, *above)
    return above, tuple(grads_above)


def _gradients(output: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Vector-Jacobian products for the leaves that want one; `None` for the others."""
    # Only for leaves that require one: gradients of frozen parameters would cost time and be dropped. A level
    # need not use every state above it, hence allow_unused.
    wanting = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanting or not output.requires_grad:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(output, wanting, grad, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """The same data as a leaf of a graph of its own: a level's backward must end there."""
    return tensor.detach().requires_grad_(requires_grad)


def _trainable(columns: Sequence[Column]) -> tuple[nn.Parameter, ...]:
    """Parameters of the chain that require gradients, each once, in a fixed order."""
    # A dict as an ordered set: the order of autograd's inputs must not depend on memory addresses.
    used: dict[nn.Parameter, None] = {}
    for column in columns:
        for position in range(column.num_levels):
            used.update(dict.fromkeys(column.level(position).parameters()))
        used.update(dict.fromkeys(column.scales()))
    return tuple(parameter for parameter in used if parameter.requires_grad)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """A context without gradients that leaves generators and autocast's cache as they were."""
    with torch.no_grad(), _randomness_kept(device), _precision(device)():
        yield


def inverse_error(columns: Sequence[Column], x: Tensor, states: States | None = None) -> float:
    """Run a chain forward and invert it: the largest absolute error of all rebuilt states.

    `states` are compared too where they are given, else the states of the first column are the last ones.
    Nothing is changed, the generators included; autocast is as at the call. Scales are not clamped.
    """
    if autocasts(x.device):
        x = x.float()
    trail: list[tuple[Column, States | None, list[_Randomness | None]]] = []
    with aside(x.device):
        for column in columns:
            drawn: list[_Randomness | None] = []
            trail.append((column, states, drawn))
            states = _run_column(column, x, states, column.num_levels, drawn)
        assert states is not None
        errors: list[Tensor] = []
        rebuilt = states
        for column, true, drawn in reversed(trail):
            if true is not None:
                rebuilt = _rebuild(column, x, rebuilt, drawn)
                errors += [(ours - theirs).abs().max() for ours, theirs in zip(rebuilt, true, strict=True)]
    return float(torch.stack(errors).max()) if errors else 0.0


def _rebuild(column: Column, x: Tensor, outputs: States, drawn: list[_Randomness | None]) -> States:
    """The inverse equation, without gradients."""
    above: States = ()
    for position in reversed(range(column.num_levels)):
        below = outputs[position - 1] if position else x
        _restore(drawn[position], x.device)
        branch = column.level(position)(below, above).to(x.dtype)
        above = ((outputs[position] - branch) / column.scales()[position], *above)
    return above


@torch.no_grad()
def clamp_scales(columns: Sequence[Column], smallest: float = SMALLEST_SCALE) -> None:
    """Keep every scale at least `smallest` away from 0, in place; signs are kept, 0 becomes `smallest`."""
    # The released RevCol code multiplies by sign(scale), which is 0 for an exact 0 and leaves it there.
    for column in columns:
        for scale in column.scales():
            scale.copy_(scale.abs().clamp_min(smallest) * torch.where(scale < 0, -1.0, 1.0))


@torch.no_grad()
def smallest_scale(columns: Sequence[Column]) -> float:
    """Min |scale|; infinite without scales, and on the meta device, where tensors have no values."""
    scales = [scale for column in columns for scale in column.scales()]
    if not scales or scales[0].is_meta:
        return math.inf
    return float(torch.cat([scale.flatten() for scale in scales]).abs().min())


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this type of device."""
    # Asked in this order: torch raises for device types without autocast, such as meta.
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _precision(device: torch.device) -> _Precision:
    """A factory of contexts with the current autocast settings."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    return partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        # autocast caches the cast copies of weights until its outermost context ends. Copies made in a
        # forward without gradients have no graph, and a later forward that found them would give weights no
        # gradient.
        cache_enabled=False,
    )


def _randomness(device: torch.device) -> _Randomness:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return draws.place(), tuple(states)


def _restore(randomness: _Randomness | None, device: torch.device) -> None:
    if randomness is None:
        return
    place, states = randomness
    draws.go_to(place)
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """A context after which draws and generators are as before it, whatever was drawn or restored."""
    # Otherwise a backward would leave the generators as its last recomputed level did, and training would
    # draw the same numbers again.
    with draws.kept(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
