"""When training stops early: the loss is not finite, or SIGTERM was received."""

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
    """Whether SIGTERM was received."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Within it, SIGTERM sets a flag that the loop reads at its next step boundary; the old handler returns.

    Kubernetes sends SIGTERM to a pre-empted pod, torchrun to all its ranks. Outside the main thread nothing
    is changed.
    """
    request = StopRequest()

    # Only a flag: a handler runs between any two bytecodes, also in the middle of an optimiser step.
    def note(signal_number: int, frame: FrameType | None) -> None:
        request.requested = True

    # Python allows signal handlers in the main thread only.
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
        fix="run the same command again; it resumes from this state",
    )


def divergence(folder: Path, suspect: tuple[Batch, Draw] | None, what: str, step: int) -> DivergenceError:
    """Save the offending micro-batch beside the training states and return the error that names the file.

    Args:
        folder: of the training states.
        suspect: the micro-batch and the arguments of its draws; `None` when another rank has it.
        what: what is not finite, as the start of a sentence.
        step: optimiser steps done before.

    Raises:
        StorageError: when the disk refuses the write.
    """
    # On the other ranks the chunk is unknown: their message names the pattern.
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
                    # With these the step can be repeated exactly: every draw is a function of them.
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
