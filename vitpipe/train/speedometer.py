"""How fast a run is and how much memory it takes."""

from __future__ import annotations

import resource
import time

import torch


class Speedometer:
    """Wall time since the last logged point and since the last save; starts now, at `step`."""

    def __init__(self, step: int) -> None:
        self._logged_step = step
        self._logged_at = self._saved_at = time.monotonic()

    def images_per_second(self, step: int, global_batch: int) -> float:
        """Over the steps since the last call, all ranks together."""
        now = time.monotonic()
        rate = (step - self._logged_step) * global_batch / max(now - self._logged_at, 1e-9)
        self._logged_step, self._logged_at = step, now
        return rate

    def minutes_since_save(self) -> float:
        """Since the last save or the start."""
        return (time.monotonic() - self._saved_at) / 60

    def saved(self) -> None:
        """A state has just been saved."""
        self._saved_at = time.monotonic()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: on a GPU by tensors, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
