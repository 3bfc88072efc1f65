"""The training loop. Independent of method, dataset and tracker.

    resume > for each step: micro-batches > backward > clip > method's hook > optimiser > EMA > method's hook
           > log > validate > save

A run is a function of its seed: draws belong to a step and an image (`models.draws`), batches are requested
by step, schedules are pure functions of the step. So the division of a step into micro-batches and ranks
changes rounding only; a run that was stopped and resumed ends with the same weights and the same logged
points as an uninterrupted one, bit for bit on a CPU.

Three things depend on the micro-batch: batch norm, in-batch mixing, and dropout or drop path in networks of
libraries, which draw from torch's generators. These are seeded for every micro-batch from its first image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitpipe.config.resolve import TrainPlan
from vitpipe.config.train_sections import LoopConfig, OptimConfig
from vitpipe.contracts.errors import CheckpointError
from vitpipe.contracts.logger import RunLogger
from vitpipe.data.moment import Moment
from vitpipe.optim.clipping import clip_gradients
from vitpipe.optim.optimiser import set_learning_rate, set_weight_decay
from vitpipe.optim.schedules import learning_rate, weight_decay
from vitpipe.train.average import WeightAverage
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.health import divergence, stop_on_signals, stopped
from vitpipe.train.precision import autocast, grad_scaler
from vitpipe.train.ranks import Ranks
from vitpipe.train.speedometer import Speedometer, peak_memory_gib
from vitpipe.train.state import TrainState
from vitpipe.train.trainable import MicroBatch, Trainable, draws_of
from vitpipe.train.validation import Validation


def train(
    method: Trainable,
    batches: Callable[[int], Iterator[MicroBatch]],
    plan: TrainPlan,
    *,
    optimiser: torch.optim.Optimizer,
    section: LoopConfig,
    ranks: Ranks,
    states: StateFolder,
    logger: RunLogger,
    start: str = "",
    validation: Validation | None = None,
) -> TrainState:
    """Train from the newest saved state, or from the start, to the end of the plan.

    Args:
        method: on its device, with its starting weights.
        batches: step -> this rank's micro-batches from that step on, `plan.accumulation` per step.
        optimiser: over the method's parameters; groups carry `lr_scale` and `decays`.
        section: schedules, gradient clipping, EMA, logging and saving intervals.
        start: message about the starting weights, shown when no state is resumed.
        validation: measured during training, for its curve; weights are the same bits without it.

    Returns:
        The state after the last step, which is also saved.

    Raises:
        CheckpointError, StorageError: when a state does not fit the network or cannot be written.
        DivergenceError: when loss or gradient are not finite; the batch is saved beside the states.
        StoppedError: after SIGTERM or Ctrl-C; the state is saved.
    """
    average = WeightAverage(method.model, section.ema_decay) if section.ema_decay else None
    state = TrainState(method, optimiser, grad_scaler(ranks.device, plan.precision), average)
    method.begin()
    _resume(state, states, ranks, logger, start)
    # Wrapped after resuming: DDP sends rank 0's parameters and buffers to all ranks when it is constructed.
    wrapped, stream, pace = ranks.wrap(method), batches(state.step), Speedometer(state.step)
    method.train()
    with stop_on_signals() as stop:
        while state.step < plan.num_steps:
            last = state.step + 1 == plan.num_steps
            logs = last or (state.step + 1) % section.log_every_steps == 0
            lr = _set_schedules(state, plan, section)
            result = _forward_backward(wrapped, stream, state, plan, ranks)
            saves = last or stop.requested or pace.minutes_since_save() >= section.checkpoint_minutes
            norm = _clip(state, section.optim, measured=logs or saves)
            # Before the optimiser: a loss that is not finite must not reach the weights.
            losses, stopping = _reduce_and_check(result, norm, saves and stop.requested, state, states, ranks)
            state.take_step(result.suspect.moment, ranks)
            logger.progress(state.step, plan.num_steps, losses)
            state.add_to_window(losses)
            if logs:
                _log(state, lr, norm, pace, plan.global_batch, result.suspect.moment, logger)
            if validation is not None:
                validation.log_if_due(method, state.step, last, pace, logger)
            if saves or stopping:
                _save(state, states, ranks, pace, logger)
            if stopping:
                raise stopped(stop, states.folder, state.step, plan.num_steps)
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
    suspect: MicroBatch
    finite: bool = True


def _set_schedules(state: TrainState, plan: TrainPlan, section: LoopConfig) -> float:
    """Set learning rate, which is returned, and weight decay of the next step."""
    # Functions of the step and not scheduler objects, which would be state to save.
    lr = learning_rate(state.step, plan, section.optim)
    set_learning_rate(state.optimiser, lr)
    if section.optim.final_weight_decay is not None:
        set_weight_decay(state.optimiser, weight_decay(state.step, plan, section.optim))
    return lr


def _forward_backward(
    wrapped: nn.Module, stream: Iterator[MicroBatch], state: TrainState, plan: TrainPlan, ranks: Ranks
) -> _StepResult:
    """Accumulate the gradients of one step; ranks all-reduce them in the last micro-batch only."""
    result: _StepResult | None = None
    for micro in range(plan.accumulation):
        batch = next(stream)
        draws = draws_of(batch)
        batch = batch.to(ranks.device)
        # DDP's `no_sync` must enclose the forward pass, too.
        with draws, ranks.gradient_sync(wrapped, sync=micro == plan.accumulation - 1):
            with autocast(ranks.device, plan.precision):
                losses: dict[str, Tensor] = wrapped(batch)
            # Outside autocast, as torch advises: the backward pass uses the types of the forward pass.
            state.scaler.scale(losses["loss"] / plan.accumulation).backward()
        values = {name: float(value.detach()) / plan.accumulation for name, value in losses.items()}
        if result is None:
            result = _StepResult(dict.fromkeys(values, 0.0), batch)
        if result.finite:
            result.suspect, result.finite = batch, all(map(math.isfinite, values.values()))
        result.losses = {name: result.losses[name] + value for name, value in values.items()}
    assert result is not None
    return result


def _clip(state: TrainState, optim: OptimConfig, *, measured: bool) -> float | None:
    """Clip the gradient as the recipe says; its norm before, where it was computed (`clip_gradients`).

    Args:
        measured: compute the norm anyway. Steps whose result is shown or saved are always checked: a state
        must
            not hold the harm of a gradient that is not finite.
    """
    # The threshold, and the method's hook, refer to true gradients, so the loss scale is removed first.
    state.scaler.unscale_(state.optimiser)
    parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
    return clip_gradients(parameters, optim.clip_grad_norm, each=optim.clip_each_tensor, measured=measured)


def _reduce_and_check(
    result: _StepResult, norm: float | None, stop: bool, state: TrainState, states: StateFolder, ranks: Ranks
) -> tuple[dict[str, float], bool]:
    """Losses averaged over the ranks, and whether any rank was asked to stop.

    Raises:
        DivergenceError: on every rank, when any rank's loss is not finite, or (without loss scaling) the
            gradient.
    """
    # With fp16 GradScaler skips such a step itself and lowers its scale.
    overflow = norm is not None and not state.scaler.is_enabled() and not math.isfinite(norm)
    # Losses and flags in one all-reduce per step. All ranks must come to the same decision: a rank that
    # stopped alone would leave the others waiting in their next exchange.
    flags = [float(not result.finite), float(overflow), float(stop)]
    *totals, num_bad, num_overflows, num_stops = ranks.sum_numbers([*result.losses.values(), *flags])
    if num_bad or num_overflows:
        what = "the loss is not finite" if num_bad else "the gradient is not finite"
        # Only the rank with the bad loss saves its batch. The gradient is the same on all ranks.
        suspect = result.suspect if not (num_bad and result.finite) else None
        raise divergence(states.folder, suspect, what, state.step)
    losses = {name: total / ranks.num_ranks for name, total in zip(result.losses, totals, strict=True)}
    return losses, num_stops > 0


def _log(
    state: TrainState,
    lr: float,
    norm: float | None,
    pace: Speedometer,
    batch: int,
    moment: Moment,
    logger: RunLogger,
) -> None:
    """Log means since the last point, rate and gradient norm of the last step, images/s, memory in GiB."""
    points = {**state.window_means(), "learning_rate": lr}
    for line in state.method.warnings(points, moment):
        logger.say(line)
    points["images_per_second"] = pace.images_per_second(state.step, batch)
    # In fp16 occasional overflows are how the loss scale adjusts itself; such a norm is no number to draw.
    if norm is not None and math.isfinite(norm):
        points["grad_norm"] = norm
    points["memory_gib"] = peak_memory_gib(next(state.method.parameters()).device)
    if state.scaler.is_enabled():
        points["loss_scale"] = state.scaler.get_scale()
    logger.metrics({f"train/{name}": value for name, value in points.items()}, state.step)


def _save(state: TrainState, states: StateFolder, ranks: Ranks, pace: Speedometer, logger: RunLogger) -> None:
    if ranks.is_main:
        states.save(state.state_dict(), state.step)
    # After saving: points up to here will never be computed again and may be sent.
    logger.commit(state.step)
    pace.saved()


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
