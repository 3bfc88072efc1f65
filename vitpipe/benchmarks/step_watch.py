"""Where the time of a step of `train.loop.train` goes: seen from what the loop is given, without changing it.

The loop calls ranks, method, average and logger in this order, and every call ends a part of the step:

    batch > [ranks.gradient_sync: forward > backward] > gradient norm > ranks.sum_numbers > before_update
          > optimiser > weight average > after_step > logger.progress
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitpipe.benchmarks.tensor_memory import LiveMemory
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.train.average import WeightAverage
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.ranks import Ranks
from vitpipe.train.trainable import Trainable

PARTS: Mapping[str, str] = {
    "forward": "losses of the batch",
    "backward": "gradients of all parameters",
    "gradient_norm": "norm over all gradients, and clipping; without clipping in logged steps only",
    "optimiser": "update of the weights, release of the gradients",
    "weight_average": "EMA of the weights",
    "hooks": "what the method does before and after the update",
    "other": "seeds of the draws, copy of the batch to the device, check of the losses",
}
FOLLOWED = 1  # the step whose tensors are followed, from 0


class Watch:
    """Divides the time of every step into parts, each from the end of the part before it to its own end.

    Attributes:
        rounds: of every step that is done, part -> seconds.
        peak_bytes: of the step whose tensors were followed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[dict[str, float]] = []
        self.peak_bytes = 0
        self._model: Trainable | None = None
        self._parts: dict[str, float] = {}
        self._last = 0.0
        self._inside = False

    def begin(self) -> None:
        """A step begins."""
        self._parts, self._last = {}, self._now()

    def end(self, part: str) -> None:
        """What has happened since the last call belongs to this part."""
        # A hook may sum over the ranks or update an average of its own: that time is the hook's.
        if self._inside:
            return
        now = self._now()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def finish(self) -> None:
        """The step is done."""
        self.end("other")
        self.rounds.append(self._parts)

    def follow(self, method: Trainable) -> None:
        """Note when the method's losses and its hooks around the update are done."""
        self._model = method
        method.register_forward_hook(lambda *call: self.end("forward"))
        for name, before in (("before_update", "other"), ("after_step", "optimiser")):
            # An empty hook is no part of its own.
            is_empty = getattr(type(method), name) is getattr(Trainable, name)
            # On the instance, where it shadows the method of the class.
            setattr(
                method, name, self._timed(getattr(method, name), before, "other" if is_empty else "hooks")
            )

    @contextmanager
    def following_averages(self) -> Iterator[None]:
        """Within it, note when an average of weights is updated; the loop makes that object itself."""
        update = WeightAverage.update
        setattr(WeightAverage, "update", self._timed(update, "optimiser", "weight_average"))  # noqa: B010
        try:
            yield
        finally:
            setattr(WeightAverage, "update", update)  # noqa: B010

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Forward and backward pass."""
        self.end("other")
        if len(self.rounds) != FOLLOWED:
            yield
        else:
            with LiveMemory() as memory:
                yield
            assert self._model is not None
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            self.peak_bytes = memory.peak_bytes(without=gradients)
        self.end("backward")

    def _timed(self, function: Callable[..., Any], before: str, own: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> None:
            self.end(before)
            outer, self._inside = self._inside, True
            function(*arguments)
            self._inside = outer
            self.end(own)

        return timed

    def _now(self) -> float:
        # CUDA kernels run asynchronously: without this only their launch would be timed.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class WatchedRanks(Ranks):
    """A single rank that tells the watch when the loop comes to it."""

    watch: Watch

    @contextmanager
    def gradient_sync(self, wrapped: nn.Module, sync: bool) -> Iterator[None]:
        """As `Ranks.gradient_sync`: encloses forward and backward pass of a micro-batch."""
        with self.watch.passes(), super().gradient_sync(wrapped, sync):
            yield

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """As `Ranks.sum_numbers`: the loop calls it when the gradient is clipped."""
        self.watch.end("gradient_norm")
        return super().sum_numbers(numbers)


class StepEnds(MemoryLogger):
    """Tells the watch when a step is done."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """The loop calls it after every step, before logging and saving."""
        self._watch.finish()


class NoStates(StateFolder):
    """Neither reads nor writes states: a large network's takes seconds and gigabytes."""

    def newest(self) -> dict[str, Any] | None:
        """No state."""
        return None

    def save(self, content: dict[str, Any], step: int) -> None:
        """Nothing is written."""
