"""Training speed in images per second, and peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Speedometer:
    """Measures the time since the last logged point and since the last save.

    Args:
        step: optimiser steps done when measuring starts.
    """

    def __init__(self, step: int) -> None:
        self._logged_step = step
        # Monotonic: wall-clock time jumps when NTP corrects it.
        self._logged_at = self._saved_at = time.monotonic()

    def images_per_second(self, step: int, global_batch: int) -> float:
        """Mean over the steps since the last call, all ranks together."""
        now = time.monotonic()
        rate = (step - self._logged_step) * global_batch / max(now - self._logged_at, 1e-9)
        self._logged_step, self._logged_at = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is no training, and does not count in `images_per_second`."""
        began = time.monotonic()
        yield
        self._logged_at += time.monotonic() - began

    def minutes_since_save(self) -> float:
        """Minutes since the last save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def saved(self) -> None:
        """Record that a state has just been saved."""
        self._saved_at = time.monotonic()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: on a GPU allocated by tensors, on a CPU resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux reports KiB (macOS bytes).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
