"""The baseline beside a masked pre-training loss: the best guess that needs no network.

Shapes: B images, N units in row-major order, D = 16 * 16 * 3 values of a unit, the colour running fastest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitpipe.train.ranks import Ranks


class TrivialPredictor:
    """The best guess that needs no network: the mean image, shifted by one colour per image.

    The colour is the mean difference of an image's visible units from the mean image. A network that predicts
    no better has learnt nothing of the images' content.

    Args:
        targets: units (B, N, D) of all images, in batches; each rank's share.
        ranks: that share them.
    """

    def __init__(self, targets: Iterable[Tensor], ranks: Ranks) -> None:
        total, count = torch.zeros(()), 0
        for units_BND in targets:
            total = total + units_BND.double().sum(dim=0)
            count += len(units_BND)
        (all_images,) = ranks.sum_numbers([float(count)])
        self.mean_ND = (ranks.sum(total) / max(all_images, 1.0)).float()

    def __call__(self, units_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """The guess (B, N, D) from the visible units, those whose mask is 0."""
        visible_BN1 = (1 - mask_BN).unsqueeze(-1)
        # Every unit is 256 pixels of 3 colours.
        gap_BNPc = ((units_BND - self.mean_ND) * visible_BN1).unflatten(-1, (-1, 3))
        pixels_B1 = visible_BN1.sum(dim=(1, 2)).unsqueeze(-1) * gap_BNPc.shape[2]
        colour_Bc = gap_BNPc.sum(dim=(1, 2)) / pixels_B1
        shift_BD = colour_Bc.repeat(1, units_BND.shape[-1] // 3)
        return self.mean_ND + shift_BD.unsqueeze(1)
