"""Which of its eight neighbours every patch takes as positives.

Patch-level Representation Learning for Self-supervised Vision Transformers; Sukmin Yun et al.; CVPR 2022.
Rows and columns wrap round at the border, as in the released code, so all patches have equally many.

Shapes: B images, N = rows * columns patches in row-major order, C channels, k positives.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.config.distillation_section import neighbours_misfit
from vitpipe.contracts.errors import InputError

Grid = tuple[int, int]


@functools.cache
def _offsets(grid: Grid) -> tuple[tuple[int, int], ...]:
    """Steps in rows and columns to every different neighbour."""
    # With two rows the steps -1 and 1 lead to the same patch; with one row they lead to the patch itself.
    rows, columns = (sorted({step % side for step in (-1, 0, 1)}) for side in grid)
    return tuple((down, right) for down in rows for right in columns if (down, right) != (0, 0))


def neighbour_table(grid: Grid) -> Tensor:
    """Positions of the neighbours of every patch: (N, `num_neighbours`) int64, ascending."""
    rows, columns = grid
    position = torch.arange(rows * columns).view(rows, columns)
    shifted = [position.roll((-down, -right), (0, 1)).flatten() for down, right in _offsets(grid)]
    return torch.stack(shifted, dim=1).sort(dim=1).values


@torch.no_grad()
def nearest_neighbours(tokens_BNC: Tensor, grid: Grid, k: int) -> Tensor:
    """Positions of the k neighbours with the largest cosine similarity: (B, N, k) int64, nearest first.

    Args:
        tokens_BNC: of one image each; without gradient.
        k: at most `num_neighbours(grid)`.

    Raises:
        InputError: when a patch has fewer neighbours.
    """
    if problem := neighbours_misfit(k, [grid]):
        raise InputError(problem, where="neighbours", fix="correct one of the two")
    # Whole maps against shifted maps: gathering the neighbours' tokens would take eight times the memory.
    unit = F.normalize(tokens_BNC.float(), dim=-1).unflatten(1, grid)
    position = torch.arange(grid[0] * grid[1], device=tokens_BNC.device).view(grid)
    offsets = _offsets(grid)
    similarity = [(unit * unit.roll((-down, -right), (1, 2))).sum(-1).flatten(1) for down, right in offsets]
    positions = [position.roll((-down, -right), (0, 1)).flatten() for down, right in offsets]
    chosen_BNk = torch.stack(similarity, dim=-1).topk(k, dim=-1).indices
    table_BNo = torch.stack(positions, dim=-1).expand(len(unit), -1, -1)
    return table_BNo.gather(2, chosen_BNk)
