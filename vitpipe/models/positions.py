"""Position embeddings of units: sine-cosine tables, their resampling, and relative positions.

Sine-cosine tables as in Masked Autoencoders Are Scalable Vision Learners; Kaiming He, Xinlei Chen, Saining
Xie, Yanghao Li, Piotr Dollar, Ross Girshick; arXiv 2111.06377, section 3 (the 2-D form of its released code).
Relative bias as in Swin Transformer; Ze Liu et al.; arXiv 2103.14030, equation 4.

Shapes: S units per side, N = S*S units in row-major order, C channels, H heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")


def _computed_on_cpu(table: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute a table on the CPU, then move it to the default device.

    On the meta device, where networks are built to know their widths, PyTorch runs most of these operations
    by its references in Python, whose first call imports torch._dynamo: 3 s in every dense stage.
    """

    @functools.wraps(table)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = torch.get_default_device()
        with torch.device("cpu"):
            found = table(*args, **kwargs)
        return found.to(device)

    return computed


@_computed_on_cpu
def sincos_table(side: int, width: int) -> Tensor:
    """Fixed 2-D position table (1, side*side, width), float32.

    The first half of the channels encodes the column, the second half the row; in each half the sines of
    all frequencies come before the cosines, frequency k being 10000^(-k / (width/4)).
    """
    # Two axes, each with a sine and a cosine: a quarter of the channels per function. Computed in float64 and
    # rounded once, as in the released code (numpy): in float32 the tables would differ in the last bits.
    quarter = width // 4
    frequency_k = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle_Sk = torch.arange(side, dtype=torch.float64)[:, None] * frequency_k
    axis_SC = torch.cat([angle_Sk.sin(), angle_Sk.cos()], dim=1)
    # Column first: MAE's code calls numpy's meshgrid with the width in front.
    column_NC = axis_SC.repeat(side, 1)
    row_NC = axis_SC.repeat_interleave(side, dim=0)
    return torch.cat([column_NC, row_NC], dim=1).float().unsqueeze(0)


@_computed_on_cpu
def class_sincos_table(side: int, width: int) -> Tensor:
    """MoCo-v3's fixed 2-D position table (1, side*side, width), float32.

    Four groups of channels: sine and cosine of the row, then of the column, frequency k being
    10000^(-k / (width/4)) (Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers,
    arXiv 2104.02057; the order is that of the released code).
    """
    quarter = width // 4
    frequency_k = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angle_Sk = torch.arange(side, dtype=torch.float32)[:, None] * frequency_k
    axis_SC = torch.cat([angle_Sk.sin(), angle_Sk.cos()], dim=1)
    row_NC, column_NC = axis_SC.repeat_interleave(side, dim=0), axis_SC.repeat(side, 1)
    return torch.cat([row_NC, column_NC], dim=1).unsqueeze(0)


@_computed_on_cpu
def sequence_sincos_table(num_places: int, width: int) -> Tensor:
    """Fixed table of the places in a sequence, (1, num_places, width), float32.

    Channel j of place p is the sine (even j) or cosine (odd j) of p / 10000^(2 * floor(j / 2) / width), as in
    Attention Is All You Need (Ashish Vaswani et al., arXiv 1706.03762, section 3.5).
    """
    # In float64 and rounded once, as in T2T-ViT's released code (numpy).
    exponent_C = 2 * (torch.arange(width, dtype=torch.float64) // 2) / width
    angle_NC = torch.arange(num_places, dtype=torch.float64)[:, None] / 10000.0**exponent_C
    is_even_C = torch.arange(width) % 2 == 0
    return torch.where(is_even_C, angle_NC.sin(), angle_NC.cos()).float().unsqueeze(0)


def resample_positions(table_1NC: Tensor, grid: tuple[int, int], *, has_offset: bool = True) -> Tensor:
    """Resample a square position table to another grid: (1, N, C) -> (1, rows*columns, C).

    Bicubic, with the factor (rows + 0.1) / S instead of rows / S, as in the released code of DINO, SelfPatch
    and iTPN.

    Args:
        table_1NC: N a square number.
        grid: rows and columns of units of the result.
        has_offset: with the 0.1; EsViT resizes without it.
    """
    _, num_units, width = table_1NC.shape
    side = math.isqrt(num_units)
    square = table_1NC.reshape(1, side, side, width).permute(0, 3, 1, 2)
    if not has_offset:
        resampled = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        return resampled.flatten(2).transpose(1, 2)
    # torch computes the output size as floor(S * factor), and rounding errors of rows / S could lose a row;
    # the 0.1 prevents that. It also shifts the sample points a little, even when the grid stays the same, and
    # released weights were trained with that: `size=grid` would give other values.
    factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    resampled = F.interpolate(square, scale_factor=factors, mode="bicubic", align_corners=False)
    return resampled.flatten(2).transpose(1, 2)


@_computed_on_cpu
def relative_index(side: int) -> Tensor:
    """Row of the bias table for every query i and key j: (N, N), int64.

    `(row_i - row_j + S-1) * (2S-1) + (column_i - column_j + S-1)`.
    """
    # Offsets lie in -(S-1) ... S-1 per axis, hence (2S-1)^2 rows. Without extra rows for a class token, which
    # these networks do not have.
    unit_N = torch.arange(side * side)
    row_N, column_N = unit_N // side, unit_N % side
    row_NN = row_N[:, None] - row_N[None, :] + side - 1
    column_NN = column_N[:, None] - column_N[None, :] + side - 1
    return row_NN * (2 * side - 1) + column_NN


def resize_relative_table(table_RH: Tensor, num_rows: int) -> Tensor:
    """Resize a relative bias table to another grid: ((2S-1)^2, H) -> (num_rows, H).

    Args:
        table_RH: R = (2S-1)^2 rows, one per offset.
        num_rows: of the result, (2S'-1)^2.
    """
    # Bicubic on the square of offsets without the 0.1 of `resample_positions`: so do the loaders of the
    # released dense networks.
    side, new_side = math.isqrt(table_RH.shape[0]), math.isqrt(num_rows)
    square = table_RH.t().reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return resized.flatten(2).squeeze(0).t().contiguous()
