"""The training loop, top to bottom. It knows no method, no dataset and no tracker.

    resume > for each step: micro-batches > backward > clip > optimiser > average > log > save

A run is a function of its seed: every draw is seeded from (seed, step, chunk), batches are asked for
by step, schedules are pure functions of the step. Stopped at any moment and started again, it ends in the
same weights and the same logged points, bit for bit on a CPU.
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
        method: on its device, as an undisturbed run begins.
        batches: step -> this rank's micro-batches from that step on, `plan.accumulation` for each step.
        optimiser: over the method's parameters; groups carry `lr_scale`.
        section: clipping, EMA, how often to log and save.
        start: what the weights are, said when there is no state to go on from.

    Returns:
        The state after the last step, which is also saved.

    Raises:
        DivergenceError: loss or gradient is no longer finite; the batch is saved beside the states.
        StoppedError: SIGTERM came; the state is saved.
        StorageError: a state could not be written; older ones are untouched.
    """
    average = WeightAverage(method.model, section.ema_decay) if section.ema_decay else None
    state = TrainState(method, optimiser, grad_scaler(ranks.device, plan.precision), average)
    _resume(state, states, ranks, logger, start)
    wrapped, stream, pace = ranks.wrap(method), batches(state.step), Speedometer(state.step)
    method.train()

    with stop_on_sigterm() as stop:
        while state.step < plan.num_steps:
            lr = _learning_rate(state.step, plan)
            set_learning_rate(optimiser, lr)
            done = _forward_backward(wrapped, stream, state, plan, seed, ranks)
            grad_norm = _clip(state, section.optim.clip_grad_norm)
            losses, stopping = _agree(done, grad_norm, stop.requested, state, states, ranks)
            state.take_step()

            logger.progress(state.step, plan.num_steps, losses)
            # With fp16 an overflow now and then is how the loss scale finds its height: not a norm.
            state.add_to_window(losses | ({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}))
            last = state.step == plan.num_steps
            if last or state.step % section.log_every_steps == 0:
                _log(state, lr, pace.images_per_second(state.step, plan.global_batch), ranks, logger)
            if last or stopping or pace.minutes_since_save() >= section.checkpoint_minutes:
                if ranks.is_main:
                    states.save(state.state_dict(), state.step)
                logger.commit(state.step)
                pace.saved()
            if stopping:
                raise stopped(states.folder, state.step, plan.num_steps)
    return state


@dataclass
class _Done:
    """One step's losses on this rank (means over micro-batches), and the micro-batch to blame."""

    losses: dict[str, float]
    suspect: tuple[Batch, Draw]
    finite: bool = True


def _learning_rate(step: int, plan: TrainPlan) -> float:
    return learning_rate(
        step,
        num_steps=plan.num_steps,
        warmup_steps=plan.warmup_steps,
        peak_lr=plan.peak_lr,
        min_lr=plan.min_lr,
    )


def _forward_backward(
    wrapped: nn.Module, stream: Iterator[Batch], state: TrainState, plan: TrainPlan, seed: int, ranks: Ranks
) -> _Done:
    """Accumulate the gradients of one step; ranks exchange them in the last micro-batch only."""
    done: _Done | None = None
    for micro in range(plan.accumulation):
        batch = ranks.here(next(stream))
        draw = Draw(seed, state.step, batch.chunk)
        _seed_generators(draw)
        with ranks.sharing(wrapped, share=micro == plan.accumulation - 1):
            with autocast(ranks.device, plan.precision):
                losses: dict[str, Tensor] = wrapped(batch, draw)
            state.scaler.scale(losses["loss"] / plan.accumulation).backward()
        values = {name: float(value.detach()) / plan.accumulation for name, value in losses.items()}
        if done is None:
            done = _Done(dict.fromkeys(values, 0.0), (batch, draw))
        if done.finite:
            done.suspect, done.finite = (batch, draw), all(map(math.isfinite, values.values()))
        done.losses = {name: done.losses[name] + value for name, value in values.items()}
    assert done is not None
    return done


def _seed_generators(draw: Draw) -> None:
    """Seed everything that a network or method may draw from (drop path, dropout), on CPU and GPU."""
    number = seed_of("step", draw.seed, draw.step, draw.chunk)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)


def _clip(state: TrainState, max_norm: float | None) -> float:
    """Norm of the whole gradient, which is scaled down to `max_norm` if it is larger."""
    state.scaler.unscale_(state.optimiser)
    parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _agree(
    done: _Done, grad_norm: float, stop: bool, state: TrainState, states: StateFolder, ranks: Ranks
) -> tuple[dict[str, float], bool]:
    """Losses averaged over the ranks, and whether any rank was asked to stop: one exchange per step.

    Raises:
        DivergenceError: on every rank, when any rank's loss is not finite, or (without loss scaling) the
            gradient; before the optimiser's step, so weights and saved states are still good.
    """
    overflow = not state.scaler.is_enabled() and not math.isfinite(grad_norm)
    flags = [float(not done.finite), float(stop)]
    *totals, num_bad, num_stops = ranks.sum_numbers([*done.losses.values(), *flags])
    if num_bad or overflow:
        what = "the loss is not finite" if num_bad else "the gradient is not finite"
        suspect = done.suspect if not (num_bad and done.finite) else None
        raise divergence(states.folder, suspect, what, state.step)
    losses = {name: total / ranks.num_ranks for name, total in zip(done.losses, totals, strict=True)}
    return losses, num_stops > 0


def _log(state: TrainState, lr: float, images_per_second: float, ranks: Ranks, logger: RunLogger) -> None:
    """Record the means since the last point, the learning rate of the last step, speed and memory."""
    points = {**state.window_means(), "learning_rate": lr, "images_per_second": images_per_second}
    points["memory_gib"] = peak_memory_gib(ranks.device)
    if state.scaler.is_enabled():
        points["loss_scale"] = state.scaler.get_scale()
    logger.metrics({f"train/{name}": value for name, value in points.items()}, state.step)


def _resume(state: TrainState, states: StateFolder, ranks: Ranks, logger: RunLogger, start: str) -> None:
    """Go to the newest state that rank 0 can read; without one, stay at the start."""
    saved = states.newest() if ranks.is_main else None
    step = ranks.from_main(saved["step"] if saved else 0)
    if step > 0:
        try:
            state.load_state_dict(saved or states.read(step))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The training state does not fit this network ({str(error).splitlines()[0][:120]})",
                where=states.path_of(step),
                fix="start again with another --state",
            ) from error
        logger.say(f"Going on after step {step}")
    elif start:
        logger.say(start)
    logger.rewind(step)
