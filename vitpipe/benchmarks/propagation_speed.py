"""Label propagation written out with the whole affinity matrix: what `vitpipe.evaluate.propagate` is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitpipe.evaluate.propagate import PropagationSettings


def out_of_reach(grid: tuple[int, int], reach: int) -> Tensor:
    """Which of two patches are further apart than the neighbourhood: (N, N)."""
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    return ((place[:, None] - place).abs() > reach).any(dim=2)


def propagate_fully(
    features_TNC: Tensor, labels_RC: Tensor, settings: PropagationSettings, far_NN: Tensor | None = None
) -> list[Tensor]:
    """Soft labels (L, R, C) of all frames but the first.

    Args:
        far_NN: as `out_of_reach`, if it is known already.
    """
    grid = (labels_RC.shape[0], labels_RC.shape[1])
    if far_NN is None and settings.neighbourhood:
        far_NN = out_of_reach(grid, settings.neighbourhood)
    unit_TNC = normalize(features_TNC, dim=2)
    num_labels = int(labels_RC.max()) + 1
    soft_TLN = [torch.nn.functional.one_hot(labels_RC.flatten(), num_labels).T.float()]
    for time in range(1, len(unit_TNC)):
        kept = [0, *range(1, time)[max(0, time - 1 - settings.num_context_frames) :]]
        cosine_FNN = torch.stack([unit_TNC[number] @ unit_TNC[time].T for number in kept])
        affinity_FNN = (cosine_FNN / settings.temperature).exp()
        if far_NN is not None:
            affinity_FNN = affinity_FNN * ~far_NN
        affinity_MN = affinity_FNN.flatten(0, 1)
        count = min(settings.top_k, len(affinity_MN))
        least_N = affinity_MN.topk(count, dim=0).values[-1]
        affinity_MN = affinity_MN * (affinity_MN >= least_N)
        shares_MN = affinity_MN / affinity_MN.sum(dim=0)
        soft_TLN.append(torch.cat([soft_TLN[number] for number in kept], dim=1) @ shares_MN)
    return [soft_LN.unflatten(1, grid) for soft_LN in soft_TLN[1:]]
