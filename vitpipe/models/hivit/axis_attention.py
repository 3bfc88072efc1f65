"""Attention with learnt positions per row and per column, as iTPN's large CLIP network detects with.

The decomposed form of Improved Multiscale Vision Transformers; Yanghao Li et al.; arXiv 2112.01526, section
4.1; as in iTPN's released detection code.

Shapes: B images, H heads, c channels of a head, N = rows * columns tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.blocks import Attention, Places


class AxisAttention(Attention):
    """Global attention whose scores get `q . R_row[y, y'] + q . R_column[x, x']`; heads share both tables.

    Args:
        width: channels, divisible by `num_heads`.
        num_heads: H.
        grid_side: units per side S that the tables (2S-1, c) are made for; others get them resized.
    """

    def __init__(self, width: int, num_heads: int, grid_side: int) -> None:
        super().__init__(width, num_heads)
        self.row_table, self.column_table = (
            nn.Parameter(torch.zeros(2 * grid_side - 1, width // num_heads)) for _ in range(2)
        )
        for table in (self.row_table, self.column_table):
            nn.init.trunc_normal_(table, std=0.02)

    def bias_of(self, q_BHNc: Tensor, where: Places) -> Tensor:
        """(B, H, N, N) for the grid of the tokens; the queries are not scaled."""
        assert isinstance(where, tuple)
        rows, columns = where
        q = q_BHNc.unflatten(2, (rows, columns))
        by_row = torch.einsum("bhyxc,ykc->bhyxk", q, _offsets(self.row_table, rows).to(q.dtype))
        by_column = torch.einsum("bhyxc,xkc->bhyxk", q, _offsets(self.column_table, columns).to(q.dtype))
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


def _offsets(table_Rc: Tensor, side: int) -> Tensor:
    """Table -> (side, side, c), the row for each query and key along one axis."""
    needed = 2 * side - 1
    if len(table_Rc) != needed:
        table_Rc = F.interpolate(table_Rc.t()[None], size=needed, mode="linear")[0].t()
    at = torch.arange(side, device=table_Rc.device)
    return table_Rc[at[:, None] - at[None, :] + side - 1]
