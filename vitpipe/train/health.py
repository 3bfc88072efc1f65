"""When training stops early: the loss is not finite, or SIGTERM or Ctrl-C was received."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from vitpipe.contracts.errors import DivergenceError, StoppedError, disk_errors
from vitpipe.train.trainable import MicroBatch


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    received: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether any signal was received."""
        return self.received is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it, SIGTERM and SIGINT set a flag that the loop reads at its next step boundary.

    Kubernetes sends SIGTERM to a pre-empted pod, torchrun to all its ranks, a terminal SIGINT on Ctrl-C. A
    second SIGINT ends the process at once, without a state. The old handlers return at the end. Outside the
    main thread nothing is changed.
    """
    request = StopRequest()

    # Only a flag: a handler runs between any two bytecodes, also in the middle of an optimiser step.
    def note(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Somebody waits at a terminal, and a step may take a minute. Straight to stderr, because print
            # may have been interrupted while it held its lock.
            os.write(2, b"\nSaving the state after this step. Ctrl-C again stops at once.\n")

    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(request: StopRequest, folder: Path, step: int, num_steps: int) -> StoppedError:
    """The error that ends a run whose state after `step` steps has been saved in `folder`."""
    # The request may have reached another rank only.
    name = request.received.name if request.received else "a signal to another rank"
    return StoppedError(
        f"Stopped by {name} after step {step} of {num_steps}; the state is saved",
        where=folder,
        fix="run the same command again; it resumes from this state",
        by=request.received or signal.SIGTERM,
    )


def divergence(folder: Path, suspect: MicroBatch | None, what: str, step: int) -> DivergenceError:
    """Save the offending micro-batch beside the training states and return the error that names the file.

    Args:
        folder: of the training states.
        suspect: the micro-batch; `None` when another rank has it.
        what: what is not finite, as the start of a sentence.
        step: optimiser steps done before.

    Raises:
        StorageError: when the disk refuses the write.
    """
    # On the other ranks the micro-batch is unknown: their message names the pattern.
    place = folder / f"diverged-step{step:09d}-image*.pt"
    if suspect is not None:
        # Named by its first image, which is in no other micro-batch of the step.
        place = folder / f"diverged-step{step:09d}-image{int(suspect.indices_B[0])}.pt"
        with disk_errors(place):
            torch.save(
                # With the moment the step can be repeated exactly: every draw is a function of it.
                {**suspect.contents(), "moment": suspect.moment._asdict()},
                place,
            )
    return DivergenceError(
        f"Training diverged: {what} in step {step + 1}; the batch has been saved",
        where=place,
        fix="lower optim.base_lr, lengthen the warm-up, set optim.clip_grad_norm, "
        "or use precision off or bf16",
    )
