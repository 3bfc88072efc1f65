"""A measurement during training, for its curve. The weights are the same bits without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vitpipe.contracts.logger import RunLogger
from vitpipe.train.speedometer import Speedometer
from vitpipe.train.trainable import Trainable


@dataclass(frozen=True)
class Validation:
    """What is measured, and how often.

    Attributes:
        every_steps: optimiser steps between two measurements; one follows the last step, too.
        measure: numbers by name, on every rank; may leave the networks in evaluation mode.
    """

    every_steps: int
    measure: Callable[[], Mapping[str, float]]

    def log_if_due(
        self, method: Trainable, step: int, is_last: bool, pace: Speedometer, logger: RunLogger
    ) -> None:
        """Measure after the steps where that is due, log it as `val/NAME`, and go back to training."""
        if not is_last and step % self.every_steps:
            return
        # The loop's draws are functions of the step; a library's network may draw from torch's generators.
        with pace.paused(), torch.random.fork_rng():
            values = self.measure()
        logger.metrics({f"val/{name}": value for name, value in values.items()}, step)
        method.train()
