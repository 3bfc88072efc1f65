"""The training loop. Independent of method, dataset and tracker.

    resume > for each step: micro-batches > backward > clip > optimiser > EMA > log > save

A run is a function of its seed: every draw is seeded from (seed, step, chunk), batches are requested by step,
schedules are pure functions of the step. A run that was stopped and resumed ends with the same weights and
the same logged points as an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitpipe.config.recipe import TrainConfig
from vitpipe.config.resolve import TrainPlan
from vitpipe.contracts.errors import CheckpointError
from vitpipe.contracts.logger import RunLogger
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.batches import Batch
from vitpipe.methods.method import Draw, Method
from vitpipe.optim.optimiser import set_learning_rate
from vitpipe.optim.schedules import learning_rate
from vitpipe.train.average import WeightAverage
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.health import divergence, stop_on_sigterm, stopped
from vitpipe.train.precision import autocast, grad_scaler
from vitpipe.train.ranks import Ranks
from vitpipe.train.speedometer import Speedometer, peak_memory_gib
from vitpipe.train.state import TrainState


def train(
    method: Method,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainPlan,
    *,
    optimiser: torch.optim.Optimizer,
    section: TrainConfig,
    seed: int,
    ranks: Ranks,
    states: StateFolder,
    logger: RunLogger,
    start: str = "",
) -> TrainState:
    """Train from the newest saved state, or from the start, to the end of the plan.

    Args:
        method: on its device, with its starting weights.
        batches: step -> this rank's micro-batches from that step on, `plan.accumulation` per step.
        optimiser: over the method's parameters; groups carry `lr_scale`.
        section: gradient clipping, EMA, logging and saving intervals.
        start: message about the starting weights, shown when no state is resumed.

    Returns:
        The state after the last step, which is also saved.

    Raises:
        CheckpointError, StorageError: when a state does not fit the network or cannot be written.
        DivergenceError: when loss or gradient are not finite; the batch is saved beside the states.
        StoppedError: after SIGTERM; the state is saved.
    """
    average = WeightAverage(method.model, section.ema_decay) if section.ema_decay else None
    state = TrainState(method, optimiser, grad_scaler(ranks.device, plan.precision), average)
    _resume(state, states, ranks, logger, start)
    # Wrapped after resuming: DDP sends rank 0's parameters and buffers to all ranks when it is constructed.
    wrapped, stream, pace = ranks.wrap(method), batches(state.step), Speedometer(state.step)
    method.train()
    with stop_on_sigterm() as stop:
        while state.step < plan.num_steps:
            lr = _learning_rate(state.step, plan)
            set_learning_rate(optimiser, lr)
            result = _forward_backward(wrapped, stream, state, plan, seed, ranks)
            grad_norm = _clip(state, section.optim.clip_grad_norm)
            # Before the optimiser: a loss that is not finite must not reach the weights.
            losses, stopping = _reduce_and_check(result, grad_norm, stop.requested, state, states, ranks)
            state.take_step()
            logger.progress(state.step, plan.num_steps, losses)
            # In fp16 occasional overflows are how the loss scale adjusts itself; their norm has no mean.
            state.add_to_window(losses | ({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}))
            last = state.step == plan.num_steps
            if last or state.step % section.log_every_steps == 0:
                _log(state, lr, pace.images_per_second(state.step, plan.global_batch), ranks, logger)
            if last or stopping or pace.minutes_since_save() >= section.checkpoint_minutes:
                if ranks.is_main:
                    states.save(state.state_dict(), state.step)
                # After saving: points up to here will never be computed again and may be sent.
                logger.commit(state.step)
                pace.saved()
            if stopping:
                raise stopped(states.folder, state.step, plan.num_steps)
    return state


@dataclass
class _StepResult:
    """The losses of one step on this rank.

    Attributes:
        losses: means over the micro-batches.
        suspect: the first micro-batch whose loss is not finite, else the last one.
        finite: whether all losses are.
    """

    losses: dict[str, float]
    suspect: tuple[Batch, Draw]
    finite: bool = True


def _learning_rate(step: int, plan: TrainPlan) -> float:
    # A function of the step and not a scheduler object, which would be state to save.
    return learning_rate(
        step,
        num_steps=plan.num_steps,
        warmup_steps=plan.warmup_steps,
        peak_lr=plan.peak_lr,
        min_lr=plan.min_lr,
    )


def _forward_backward(
    wrapped: nn.Module, stream: Iterator[Batch], state: TrainState, plan: TrainPlan, seed: int, ranks: Ranks
) -> _StepResult:
    """Accumulate the gradients of one step; ranks all-reduce them in the last micro-batch only."""
    result: _StepResult | None = None
    for micro in range(plan.accumulation):
        batch = ranks.to_device(next(stream))
        # The chunk, not rank and micro-batch: with another number of ranks the draws are the same.
        draw = Draw(seed, state.step, batch.chunk)
        _seed_generators(draw)
        # DDP's `no_sync` must enclose the forward pass, too.
        with ranks.gradient_sync(wrapped, sync=micro == plan.accumulation - 1):
            with autocast(ranks.device, plan.precision):
                losses: dict[str, Tensor] = wrapped(batch, draw)
            # Outside autocast, as torch advises: the backward pass uses the types of the forward pass.
            state.scaler.scale(losses["loss"] / plan.accumulation).backward()
        values = {name: float(value.detach()) / plan.accumulation for name, value in losses.items()}
        if result is None:
            result = _StepResult(dict.fromkeys(values, 0.0), (batch, draw))
        if result.finite:
            result.suspect, result.finite = (batch, draw), all(map(math.isfinite, values.values()))
        result.losses = {name: result.losses[name] + value for name, value in values.items()}
    assert result is not None
    return result


def _seed_generators(draw: Draw) -> None:
    """Seed the global generators that a network or method may draw from (drop path, dropout), CPU and GPU."""
    # Once per micro-batch, so that no generator state has to be saved and a resumed run draws the same.
    number = seed_of("step", draw.seed, draw.step, draw.chunk)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)  # NumPy's legacy seed has 32 bits
    torch.manual_seed(number)


def _clip(state: TrainState, max_norm: float | None) -> float:
    """Clip the gradient to `max_norm` (L2 norm over all parameters together); returns the norm before."""
    # The threshold refers to true gradients, so the loss scale is removed first. Without a threshold, too:
    # the norm is logged.
    state.scaler.unscale_(state.optimiser)
    parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _reduce_and_check(
    result: _StepResult, grad_norm: float, stop: bool, state: TrainState, states: StateFolder, ranks: Ranks
) -> tuple[dict[str, float], bool]:
    """Losses averaged over the ranks, and whether any rank has received SIGTERM.

    Raises:
        DivergenceError: on every rank, when any rank's loss is not finite, or (without loss scaling) the
            gradient.
    """
    # With fp16 GradScaler skips such a step itself and lowers its scale.
    overflow = not state.scaler.is_enabled() and not math.isfinite(grad_norm)
    # Losses and flags in one all-reduce per step. All ranks must come to the same decision: a rank that
    # stopped alone would leave the others waiting in their next exchange.
    flags = [float(not result.finite), float(stop)]
    *totals, num_bad, num_stops = ranks.sum_numbers([*result.losses.values(), *flags])
    if num_bad or overflow:
        what = "the loss is not finite" if num_bad else "the gradient is not finite"
        # Only the rank with the bad loss saves its batch. The gradient is the same on all ranks.
        suspect = result.suspect if not (num_bad and result.finite) else None
        raise divergence(states.folder, suspect, what, state.step)
    losses = {name: total / ranks.num_ranks for name, total in zip(result.losses, totals, strict=True)}
    return losses, num_stops > 0


def _log(state: TrainState, lr: float, images_per_second: float, ranks: Ranks, logger: RunLogger) -> None:
    """Log means since the last point, learning rate of the last step, images/s and peak memory (GiB)."""
    points = {**state.window_means(), "learning_rate": lr, "images_per_second": images_per_second}
    points["memory_gib"] = peak_memory_gib(ranks.device)
    if state.scaler.is_enabled():
        points["loss_scale"] = state.scaler.get_scale()
    logger.metrics({f"train/{name}": value for name, value in points.items()}, state.step)


def _resume(state: TrainState, states: StateFolder, ranks: Ranks, logger: RunLogger, start: str) -> None:
    """Load the newest state that rank 0 can read, if there is one.

    Raises:
        CheckpointError: when it does not fit the network or another rank cannot read it.
    """
    # Rank 0 decides for all: a rank that saw another set of files would train from another step.
    saved = states.newest() if ranks.is_main else None
    step = ranks.from_main(saved["step"] if saved else 0)
    if step > 0:
        try:
            state.load_state_dict(saved or states.read(step))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The training state does not fit this network ({str(error).splitlines()[0][:120]})",
                where=states.path_of(step),
                fix="run the command with another --state",
            ) from error
        logger.say(f"Resuming after step {step}")
    elif start:
        logger.say(start)
    # Points logged after the state was saved are computed again and must not appear twice.
    logger.rewind(step)
