"""The columns of RevColV2: sizes, the blocks and links of a column, layer ids.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005, supplement, table 5. What is published and what is our reading: see `revcolv2.py`. The sizes
below are our reading.

Shapes: B images, N units of 16 x 16 pixels (row-major) on a grid of H x W, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import Attention, ChannelBlock, Mlp, drop_path, init_weights
from vitpipe.models.hivit.hivit import Merge, Stem
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.revcolv2.config import NUM_COLUMNS
from vitpipe.models.reversible import Column, States

NUM_LEVELS = 4  # as in the first version
_MLP_RATIO = 4
_EMBED_MLP_RATIO = 3  # HiViT's ratio in its early stages
NORM_EPS = 1e-6  # as in MAE, and in the released code of the first version


@dataclass(frozen=True)
class RevColV2Shape:
    """One size.

    Attributes:
        name: as in the registry.
        width: channels of every level, C.
        num_heads: attention heads.
        depth: blocks per level.
        num_bottom_up: bottom-up columns.
        num_top_down: top-down columns.
        deep_embed: embed the units by a `DeepEmbed` instead of a single convolution.
        initial_gamma: initial value of the scales.
        neck_width: channels of the maps for detection.
    """

    name: str
    width: int
    num_heads: int
    depth: int
    num_bottom_up: int = NUM_COLUMNS
    num_top_down: int = NUM_COLUMNS
    deep_embed: bool = False
    initial_gamma: float = 0.5  # that of the first version's released code
    neck_width: int = 256  # ViTDet's

    @property
    def num_columns(self) -> int:
        """Columns of both kinds."""
        return self.num_bottom_up + self.num_top_down


SHAPES: dict[str, RevColV2Shape] = {
    shape.name: shape
    for shape in (
        # Ours, for the demo. Deep embedding, because from 2,000 images a single linear layer over 16 x 16
        # pixels does not learn useful features. Scales of 1 do not amplify rounding, and the narrow neck
        # keeps detection cheap.
        RevColV2Shape(
            "revcolv2_nano", width=48, num_heads=3, depth=1, deep_embed=True, initial_gamma=1.0, neck_width=64
        ),
        # The published counts leave only a design that runs almost entirely on 196 tokens with 240 to 490 (B)
        # and 600 to 910 (L) channels. These meet 88M / 19G and 327M / 67G (table 5) within 1.5 %: 89.1M /
        # 18.7G and 325.1M / 66.6G, with a 1000-class head and without mask tokens and pixel head.
        RevColV2Shape("revcolv2_base", width=384, num_heads=6, depth=3),
        RevColV2Shape("revcolv2_large", width=640, num_heads=10, depth=4),
    )
}


class Block(nn.Module):
    """A pre-norm transformer block on tokens (B, N, C) or on a map of them (B, H, W, C).

    Args:
        width: C.
        num_heads: attention heads.
        drop_ratio: see `drop_path`.
        window: side in units of the square windows that limit attention on a map; `None` for none.
            Maps are padded with zeros to whole windows, as in Exploring Plain Vision Transformer Backbones
            for Object Detection; Yanghao Li et al.; arXiv 2203.16527.
    """

    def __init__(self, width: int, num_heads: int, *, drop_ratio: float, window: int | None = None) -> None:
        super().__init__()
        self.drop_ratio, self.window = drop_ratio, window
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, _MLP_RATIO * width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        x = x + drop_path(self._attend(self.norm1(x)), self.drop_ratio, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_ratio, self.training)

    def _attend(self, x: Tensor) -> Tensor:
        # Global attention needs no map, so tokens (B, N, C) of masked images take this path too.
        if self.window is None:
            return self.attn(x.flatten(1, -2)).view_as(x)
        _, height, breadth, width = x.shape
        side = self.window
        # F.pad counts axes from the last: channels, columns, rows. The zeros take part in the attention, as
        # in ViTDet, which does not mask them either.
        x = F.pad(x, (0, 0, 0, -breadth % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(-1, rows, side, columns, side, width).transpose(2, 3)
        windows = self.attn(x.reshape(-1, side * side, width))
        x = windows.view(-1, rows, columns, side, side, width).transpose(2, 3)
        return x.reshape(-1, rows * side, columns * side, width)[:, :height, :breadth]


class Level(nn.Module):
    """F: `blocks(down(below) + up(above))`.

    Args:
        shape: the size.
        drop_ratios: of its blocks.
        has_down: whether `below` passes a link; the input of a column does not.
        has_up: whether the level reads the column before (`above`).
        window: see `Block`.
    """

    def __init__(
        self,
        shape: RevColV2Shape,
        drop_ratios: Sequence[float],
        *,
        has_down: bool,
        has_up: bool,
        window: int | None,
    ) -> None:
        super().__init__()
        self.down = _link(shape.width) if has_down else None
        self.up = _link(shape.width) if has_up else None
        # ViTDet leaves a few blocks global, which carry information across windows; here the last of each
        # level.
        windows = [window] * (len(drop_ratios) - 1) + [None]
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.num_heads, drop_ratio=ratio, window=side)
            for ratio, side in zip(drop_ratios, windows, strict=True)
        )

    def forward(self, below: Tensor, above: States) -> Tensor:
        """This level's state, from `below` (y_s-1 or the column's input) and `above` (u_s+1, ...).

        All are (B, N, C) or (B, H, W, C).
        """
        x = below if self.down is None else self.down(below)
        if self.up is not None:
            x = x + self.up(above[0])
        for block in self.blocks:
            x = block(x)
        return x


def _link(width: int) -> nn.Sequential:
    # In place of the first version's `down` and `up`: all levels have the same grid and width, so no
    # resampling.
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=NORM_EPS))


class TokenColumn(Column):
    """Four levels, run from 0 to 3 or, top-down, from 3 to 0.

    Args:
        shape: the size.
        top_down: the order of the levels.
        is_first: no column before it: no `up` links, no scales. False for all top-down columns: the first of
            them takes the bottom-up chain's states.
        drop_path: drop ratio of the column's last block.
        window: see `Block`.
    """

    def __init__(
        self, shape: RevColV2Shape, *, top_down: bool, is_first: bool, drop_path: float, window: int | None
    ) -> None:
        super().__init__()
        levels = range(NUM_LEVELS)
        self.order = tuple(reversed(levels)) if top_down else tuple(levels)
        # By level and not by processing order, and equal in all columns: the rule of the first version.
        last_block = NUM_LEVELS * shape.depth - 1
        ratios = [drop_path * block / last_block for block in range(last_block + 1)]
        # The first version has (untrained) scales in its first column; here it has none.
        self.gamma = nn.ParameterList(
            torch.full((shape.width,), shape.initial_gamma) for _ in levels if not is_first
        )
        self.levels = nn.ModuleList(
            Level(
                shape,
                ratios[level * shape.depth : (level + 1) * shape.depth],
                has_down=level != self.order[0],
                has_up=level != self.order[-1] and not is_first,
                window=window,
            )
            for level in levels
        )

    @property
    def num_levels(self) -> int:
        """4."""
        return NUM_LEVELS

    def level(self, position: int) -> nn.Module:
        """The level at this position of the processing order."""
        return self.levels[self.order[position]]

    def scales(self) -> tuple[nn.Parameter, ...]:
        """Gamma in processing order."""
        return tuple(self.gamma[level] for level in self.order) if len(self.gamma) else ()


class DeepEmbed(nn.Module):
    """Patch embedding by the early stages of HiViT (arXiv 2205.14949); units do not exchange information.

    Convolution 4 x 4 > channel block > merge 2 x 2 > channel block > merge 2 x 2.

    Args:
        width: channels of the result, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Stem(width // 4, norm_eps=NORM_EPS),
            ChannelBlock(width // 4, _EMBED_MLP_RATIO, norm_eps=NORM_EPS),
            Merge(width // 4, norm_eps=NORM_EPS),
            ChannelBlock(width // 2, _EMBED_MLP_RATIO, norm_eps=NORM_EPS),
            Merge(width // 2, norm_eps=NORM_EPS),
        )
        # By fan-in: at 12 to 48 channels a std of 0.02 would leave the blocks almost without effect.
        init_weights(self, 1.0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, 16 H, 16 W) -> (B, C, H, W)."""
        rows = images_BCHW.shape[-2] // UNIT_PIXELS
        x_BNC = self.layers(images_BCHW).flatten(2)
        return x_BNC.transpose(1, 2).unflatten(2, (rows, -1))


def check_shape(shape: RevColV2Shape) -> None:
    """Check that a size can be built.

    Raises:
        InputError: without columns of a kind, or when the width is no multiple of the heads and of 4.
    """
    if shape.num_bottom_up < 1 or shape.num_top_down < 1:
        raise InputError(
            f"{shape.num_bottom_up} bottom-up and {shape.num_top_down} top-down columns are too few",
            where="model.columns",
            fix="give at least one of each kind",
        )
    # 4: sine and cosine for rows and columns, see `sincos_table`.
    if shape.width % shape.num_heads or shape.width % 4:
        raise InputError(
            f"A width of {shape.width} cannot be divided by {shape.num_heads} heads and by 4 (positions)",
            where=shape.name,
            fix="use a width that is a multiple of the number of heads and of 4",
        )


_COLUMN_NAME = re.compile(
    r"(?:^|\.)(bottom_up|top_down)\.(\d+)\.(?:gamma|levels\.(\d+)\.(?:down|up|blocks\.(\d+)))(?:\.|$)"
)
_INPUT_NAME = re.compile(r"(?:^|\.)(?:patch_embed|pos_embed|top_down_pos_embed)(?:\.|$)")


def head_layer_index(shape: RevColV2Shape) -> int:
    """The highest layer id, of everything behind the columns: 16 for base, 20 for large."""
    return NUM_LEVELS * shape.depth + shape.num_columns


def layer_index(name: str, shape: RevColV2Shape) -> int:
    """Layer id of a parameter for layer-wise learning rates; the rule of RevCol's released code.

    Patches and positions 0; block h of column j (both from 0, h over the levels of a column, j over both
    kinds) h + j + 1; a link that of its level's first block; gamma j + 1; heads, necks and norms behind the
    columns `head_layer_index`.
    """
    if _INPUT_NAME.search(name):
        return 0
    found = _COLUMN_NAME.search(name)
    if found is None:
        return head_layer_index(shape)
    kind, index, level, block = found.groups()
    column = int(index) + (shape.num_bottom_up if kind == "top_down" else 0)
    return int(level or 0) * shape.depth + int(block or 0) + column + 1
