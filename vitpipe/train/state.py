"""Everything that a training run carries from one step to the next.

States of random generators are not part of it: every draw is a function of the step and of the images.
"""

from __future__ import annotations

from typing import Any

import torch

from vitpipe.data.moment import Moment
from vitpipe.train.average import WeightAverage
from vitpipe.train.ranks import Ranks
from vitpipe.train.trainable import Trainable


class TrainState:
    """The state of a run.

    Attributes:
        method: networks and what the method keeps beside them.
        average: EMA of the weights, or `None`.
        step: optimiser steps done.
        window: name -> (sum, count) since the last logged point.
    """

    def __init__(
        self,
        method: Trainable,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        average: WeightAverage | None,
    ) -> None:
        self.method, self.optimiser, self.scaler, self.average = method, optimiser, scaler, average
        self.step = 0
        self.window: dict[str, tuple[float, int]] = {}

    def take_step(self, moment: Moment, ranks: Ranks) -> None:
        """Optimiser step with the accumulated gradients, between the method's hooks, and EMA; clears them.

        Args:
            moment: of the step.
            ranks: for the method's hook after the step.
        """
        self.method.before_update(moment)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        # None instead of zeros: the first backward pass of the next step writes and does not add.
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        self.method.after_step(moment, ranks)
        self.step += 1

    def add_to_window(self, values: dict[str, float]) -> None:
        """Add one step's values to the means of the next point."""
        for name, value in values.items():
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + value, count + 1)

    def window_means(self) -> dict[str, float]:
        """Means over the steps since the last call; starts a new window."""
        means = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it can be read with `weights_only=True`."""
        return {
            "step": self.step,
            # Saved, too, so that a resumed run logs the same means although it stopped between two points.
            "window": dict(self.window),
            "method": self.method.resume_state(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.shadow if self.average else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a saved state; raises what torch raises when it does not fit the network."""
        self.step, self.window = saved["step"], dict(saved["window"])
        self.method.load_resume_state(saved["method"])
        self.optimiser.load_state_dict(saved["optimiser"])
        # Empty when it was saved without loss scaling, and GradScaler refuses an empty one.
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load(saved["average"])
