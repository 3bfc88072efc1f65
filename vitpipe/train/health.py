"""When to stop: the loss is no longer finite, or somebody asks the process to go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from vitpipe.contracts.errors import DivergenceError, StoppedError, disk_errors
from vitpipe.data.batches import Batch
from vitpipe.methods.method import Draw


class StopRequest:
    """Set once SIGTERM has come."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request that the loop answers at its next step boundary.

    Kubernetes sends it to a pod that is pre-empted, torchrun to all its ranks. Outside the main thread,
    where Python allows no handlers, nothing is changed.
    """
    request = StopRequest()

    def note(signal_number: int, frame: FrameType | None) -> None:
        request.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(folder: Path, step: int, num_steps: int) -> StoppedError:
    """The error that ends a run whose state after `step` steps has been saved in `folder`."""
    return StoppedError(
        f"Stopped by SIGTERM after step {step} of {num_steps}; the state is saved",
        where=folder,
        fix="run the same command again, it goes on from there",
    )


def divergence(folder: Path, suspect: tuple[Batch, Draw] | None, what: str, step: int) -> DivergenceError:
    """Save the offending micro-batch beside the training state and make the error that names it.

    Args:
        suspect: the micro-batch and what its draws are a function of; `None` when another rank has it.
        what: what is not finite.
        step: optimiser steps done before.
    """
    place = folder / f"diverged-step{step:09d}-chunk*.pt"
    if suspect is not None:
        batch, draw = suspect
        place = folder / f"diverged-step{step:09d}-chunk{draw.chunk}.pt"
        with disk_errors(place):
            torch.save(
                {
                    "images": batch.images_BCHW.cpu(),
                    "labels": batch.labels_B.cpu(),
                    "indices": batch.indices_B.cpu(),
                    "draw": {"seed": draw.seed, "step": draw.step, "chunk": draw.chunk},
                },
                place,
            )
    return DivergenceError(
        f"Training diverged: {what} in step {step + 1}; the batch has been saved",
        where=place,
        fix="lower optim.base_lr, lengthen optim.warmup_epochs, set optim.clip_grad_norm, "
        "or use precision off or bf16",
    )
