"""What masked image modelling on pixels predicts: normalised units.

Shapes: B images, N units in row-major order, D = 16 * 16 * 3 values of a unit, the colour running fastest.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from vitpipe.models.masking import patchify

# MAE's, added to the variance of a unit.
_EPS = 1e-6


class Target(NamedTuple):
    """Normalised units; `units * spread + mean` are the pixels.

    Attributes:
        units_BND: what is to be predicted, (B, N, D).
        mean: (B, N, 1), or (B, 1, 1) when an image is normalised as a whole.
        spread: as `mean`.
    """

    units_BND: Tensor  # noqa: N815
    mean: Tensor
    spread: Tensor


def normalised_target(images_BCHW: Tensor, by: Literal["unit", "image"] = "unit") -> Target:
    """The target, normalised by mean and unbiased variance, eps 1e-6.

    Args:
        images_BCHW: normalised images.
        by: every unit by its own (MAE, arXiv 2111.06377, section 3), or all units of an image by the image's.
    """
    units_BND = patchify(images_BCHW)
    axes = (-1,) if by == "unit" else (-2, -1)
    # Written out: torch's `var` takes three times as long on a CPU. Unbiased because MAE's is by default.
    mean = units_BND.mean(dim=axes, keepdim=True)
    centred_BND = units_BND - mean
    count = units_BND[0].numel() if by == "image" else units_BND.shape[-1]
    variance = centred_BND.square().sum(dim=axes, keepdim=True) / (count - 1)
    spread = (variance + _EPS).sqrt()
    return Target(centred_BND / spread, mean, spread)
