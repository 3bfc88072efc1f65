"""Everything that a training run carries from one step to the next.

Random states are not among it: before every micro-batch the generators are seeded from (seed, step, chunk),
so there is nothing to carry and a resumed run draws what an undisturbed one does.
"""

from __future__ import annotations

from typing import Any

import torch

from vitpipe.methods.method import Method
from vitpipe.train.average import WeightAverage


class TrainState:
    """The moving parts of a run.

    Attributes:
        step: optimiser steps done.
        window: name -> (sum, count) since the last logged point. Saved with the rest, so that a resumed
            run logs the very same means.
    """

    def __init__(
        self,
        method: Method,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        average: WeightAverage | None,
    ) -> None:
        self.method, self.optimiser, self.scaler, self.average = method, optimiser, scaler, average
        self.step = 0
        self.window: dict[str, tuple[float, int]] = {}

    def take_step(self) -> None:
        """Move the weights by the gradients that are there, clear those, move the average."""
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.method.model)
        self.step += 1

    def add_to_window(self, values: dict[str, float]) -> None:
        """Count one step's numbers."""
        for name, value in values.items():
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + value, count + 1)

    def window_means(self) -> dict[str, float]:
        """Means over the steps since the last call; empties the window."""
        means = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it can be read with `weights_only=True`."""
        return {
            "step": self.step,
            "window": dict(self.window),
            "method": self.method.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.shadow if self.average else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go back to a saved moment."""
        self.step, self.window = saved["step"], dict(saved["window"])
        self.method.load_state_dict(saved["method"])
        self.optimiser.load_state_dict(saved["optimiser"])
        # Empty when it was saved on a device that needs no loss scaling.
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load(saved["average"])
