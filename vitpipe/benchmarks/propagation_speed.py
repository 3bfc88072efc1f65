"""Time of label propagation per frame, beside the whole affinity matrix written out.

The written-out form is what `vitpipe.evaluate.propagate` is held to by its tests, too.

Shapes: T frames, N = R * C patches, D channels, L labels, F context frames, M = F * N context patches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vitpipe.contracts.units import counted
from vitpipe.evaluate.propagate import Propagation, PropagationSettings


@dataclass(frozen=True)
class PropagationTimes:
    """Seconds per frame with a full context, medians; and the largest difference of the labels."""

    strips_seconds: float
    matrix_seconds: float
    largest_difference: float

    @property
    def ratio(self) -> float:
        """Time of ours as a share of the other's."""
        return self.strips_seconds / self.matrix_seconds


def out_of_reach(grid: tuple[int, int], reach: int) -> Tensor:
    """Which of two patches are further apart than the neighbourhood: (N, N)."""
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    return ((place[:, None] - place).abs() > reach).any(dim=2)


class MatrixPropagation:
    """The protocol step by step, with the affinities of all pairs; the interface of `Propagation`."""

    def __init__(self, features_NC: Tensor, labels_RC: Tensor, settings: PropagationSettings) -> None:
        self.settings, self.grid = settings, (labels_RC.shape[0], labels_RC.shape[1])
        self.near_NN: Tensor | None = None
        if settings.neighbourhood:
            self.near_NN = ~out_of_reach(self.grid, settings.neighbourhood).to(features_NC.device)
        first_NL = one_hot(labels_RC.long().flatten()).to(features_NC.device, torch.float32)
        self.context = [(normalize(features_NC.float(), dim=1), first_NL.T)]

    def step(self, features_NC: Tensor) -> Tensor:
        """Features (N, D) of the next frame -> its soft labels (L, R, C)."""
        own_NC = normalize(features_NC.float(), dim=1)
        kept_FNC = torch.stack([unit_NC for unit_NC, _ in self.context])
        affinity_FNN = (kept_FNC @ own_NC.T / self.settings.temperature).exp_()
        if self.near_NN is not None:
            affinity_FNN *= self.near_NN
        affinity_MN = affinity_FNN.flatten(0, 1)
        count = min(self.settings.top_k, len(affinity_MN))
        least_N = affinity_MN.topk(count, dim=0).values[-1]
        affinity_MN *= affinity_MN >= least_N
        affinity_MN /= affinity_MN.sum(dim=0)
        soft_LN = torch.cat([labels_LN for _, labels_LN in self.context], dim=1) @ affinity_MN
        first, *last = self.context
        kept = [*last, (own_NC, soft_LN)][-self.settings.num_context_frames :]
        self.context = [first, *(kept if self.settings.num_context_frames else [])]
        return soft_LN.unflatten(1, self.grid)


def measure_propagation(
    grid: tuple[int, int],
    width: int,
    settings: PropagationSettings,
    rounds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> PropagationTimes:
    """Propagate three labels through frames that resemble each other, in both ways.

    Args:
        grid: rows and columns of patches.
        width: D.
        rounds: timed frames, after the context is full.
        device: where features and labels are.
        say: told what is measured.
    """
    generator = torch.Generator().manual_seed(0)
    scene_NC = torch.randn(grid[0] * grid[1], width, generator=generator)
    num_frames = 1 + settings.num_context_frames + rounds
    frames = [
        (scene_NC + 0.5 * torch.randn(scene_NC.shape, generator=generator)).to(device)
        for _ in range(num_frames)
    ]
    labels_RC = torch.randint(3, grid, generator=generator)
    say(f"{counted(num_frames - 1, 'frame')}, each in both ways")
    strips, matrix = (way(frames[0], labels_RC, settings) for way in (Propagation, MatrixPropagation))
    ours, theirs, difference = [], [], 0.0
    # In turn: what else the machine does meets both.
    for frame_NC in frames[1:]:
        own_seconds, own = _timed(strips.step, frame_NC, device)
        their_seconds, their = _timed(matrix.step, frame_NC, device)
        ours.append(own_seconds)
        theirs.append(their_seconds)
        difference = max(difference, float((own - their).abs().max()))
    return PropagationTimes(
        statistics.median(ours[-rounds:]), statistics.median(theirs[-rounds:]), difference
    )


def _timed(step: Callable[[Tensor], Tensor], frame_NC: Tensor, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a frame, and its labels."""
    start = time.perf_counter()
    soft_LRC = step(frame_NC)
    # CUDA kernels run asynchronously: without this only their launch would be timed.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, soft_LRC
