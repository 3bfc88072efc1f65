"""When something happens in a training run: all that a draw or a schedule may depend on."""

from __future__ import annotations

from typing import NamedTuple

from vitpipe.contracts.seeds import seed_of


class Moment(NamedTuple):
    """One optimiser step of a run. The same for all images of the step, however they are divided.

    Attributes:
        seed: of the run.
        step: optimiser steps done before.
        num_steps: of the whole run.
        steps_per_epoch: steps in which every image is seen once.
    """

    seed: int
    step: int
    num_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 ... below 1."""
        return self.step / self.num_steps

    def key(self, what: str, *more: int) -> int:
        """The key of draws for one purpose in this step, see `models.draws.uniform`; 64 bits.

        Args:
            more: what else the draws depend on, such as the first image of a micro-batch.
        """
        return seed_of(what, self.seed, self.step, *more)
