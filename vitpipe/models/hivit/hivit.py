"""HiViT: three stages at strides 4, 8 and 16; units of 16 x 16 pixels exchange information in the last only.

HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling; Xiaosong Zhang, Yunjie Tian, Wei Huang,
Qixiang Ye, Qi Dai, Lingxi Xie, Qi Tian; arXiv 2205.14949, sections 3.2 and 3.3. Sizes and position embeddings
are those of Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735,
supplement, tables 7 and 8.

    image > stem > stage4 > merge4to8 > stage8 > merge8to16 > + absolute position > stage16

Shapes: B images, N units of 16 x 16 pixels (row-major), K units that are kept, h sub-tokens per side of a
unit (4, 2, 1 at strides 4, 8, 16), C channels. Everything before stage16 works on (B, N, h, h, C) and never
mixes units, so dropping a unit after the stem drops it at every level.

Parameter names: `stem.{proj,norm}`, `stage4.I.{norm,mlp}`, `merge4to8.{norm,linear}`, `stage8.I`,
`merge8to16`, `absolute_position`, `stage16.I.{norm1,attn,norm2,mlp}`; around it encoder and classifier have
`backbone.`, the classifier `head_norm.` and `head.`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import AttentionBlock, ChannelBlock, init_weights
from vitpipe.models.hivit.axis_attention import AxisAttention
from vitpipe.models.masking import gather_units, grid_of, units_per_side
from vitpipe.models.network import Task
from vitpipe.models.positions import relative_index, resample_positions


@dataclass(frozen=True)
class HiViTShape:
    """One size of HiViT.

    Attributes:
        name: as in the registry.
        depths: blocks of the stages at strides 4, 8, 16.
        widths: channels of these stages.
        num_heads: attention heads at stride 16, the only stage with attention.
        early_mlp_ratio: hidden over input width of the MLPs at strides 4 and 8.
        mlp_ratio: the same at stride 16.
        init_gain: that of `init_weights`, for the backbone and every module built around it.
    """

    name: str
    depths: tuple[int, int, int]
    widths: tuple[int, int, int]
    num_heads: int
    # 3 at strides 4 and 8 is from the released code; 4 is FFN hidden size over hidden size in tables 7 and 9.
    early_mlp_ratio: int = 3
    mlp_ratio: int = 4
    init_gain: float | None = None


SHAPES: dict[str, HiViTShape] = {
    shape.name: shape
    for shape in (
        # Ours, for the demo, which has to learn within seconds. 64 channels need initial values by fan-in:
        # with a std of 0.02 the residual branches contribute almost nothing at first.
        HiViTShape("hivit_nano", (1, 1, 4), (16, 32, 64), num_heads=4, init_gain=1.0),
        # iTPN's tables 7 and 9 give blocks, heads and the width at stride 16 (512, 768); a quarter and a half
        # of that at strides 4 and 8 is from the released code.
        HiViTShape("hivit_base", (3, 3, 24), (128, 256, 512), num_heads=8),
        HiViTShape("hivit_large", (2, 2, 40), (192, 384, 768), num_heads=12),
    )
}


class StageFeatures(NamedTuple):
    """Outputs of the three stages, before each merge: levels 4 and 8 in unit layout, level 16 as tokens."""

    level4_BNhhC: Tensor  # noqa: N815
    level8_BNhhC: Tensor  # noqa: N815
    level16_BNC: Tensor  # noqa: N815


class HiddenUnits(NamedTuple):
    """Units that stage 16 does not see, although they stay in place.

    Attributes:
        mask_BN: 1 where a unit is hidden, float32.
        token_11C: what stands there instead, of the width at stride 16.
    """

    mask_BN: Tensor  # noqa: N815
    token_11C: Tensor  # noqa: N815


class Stem(nn.Module):
    """Convolution 4 x 4 with stride 4, then LayerNorm, in unit layout: (B, 3, H, W) -> (B, N, 4, 4, C)."""

    def __init__(self, width: int, *, norm_eps: float) -> None:
        super().__init__()
        # 4 = 16 / 4: a unit of 16 x 16 pixels holds 4 x 4 sub-patches, which two merges reduce to one token.
        self.proj = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, images_BCHW: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, N, 4, 4, C), or (B, K, 4, 4, C) with `kept_BK`."""
        fine_BCHW = self.proj(images_BCHW)
        num_images, width, height, breadth = fine_BCHW.shape
        # The fine map is at stride 4, so units are 4 x 4 of its positions, whatever the image size.
        units = fine_BCHW.view(num_images, width, height // 4, 4, breadth // 4, 4)
        x_BNhhC = units.permute(0, 2, 4, 3, 5, 1).reshape(num_images, -1, 4, 4, width)
        if kept_BK is not None:
            # Before the norm, which works on each sub-token alone: the values are the same, the work less.
            x_BNhhC = gather_units(x_BNhhC, kept_BK)
        return self.norm(x_BNhhC)


class Merge(nn.Module):
    """Join each 2 x 2 of sub-tokens inside a unit: (B, N, h, h, C) -> (B, N, h/2, h/2, 2C)."""

    def __init__(self, width: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=norm_eps)
        # No bias, as in the released code (and in Swin's patch merging).
        self.linear = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BNhhC: Tensor) -> Tensor:
        """(B, N, h, h, C) -> (B, N, h/2, h/2, 2C)."""
        num_images, num_units, side, _, width = x_BNhhC.shape
        half = side // 2
        # Axes: row, row parity, column, column parity. The four children are concatenated with the row
        # parity running fastest: (even, even), (odd, even), (even, odd), (odd, odd). Released weights of
        # `linear` have their input channels in this order.
        split = x_BNhhC.view(num_images, num_units, half, 2, half, 2, width)
        joined = split.permute(0, 1, 2, 4, 5, 3, 6).reshape(num_images, num_units, half, half, 4 * width)
        return self.linear(self.norm(joined))


class HiViT(nn.Module):
    """The backbone.

    Args:
        shape: an entry of `SHAPES` or your own.
        image_size: pixels per side, a multiple of 16; fixes the grid of the relative bias.
        drop_path: drop ratio of the last block; it rises linearly from 0 over all blocks.
        absolute_position: add a learnt table once, before stage16; nothing positional enters earlier stages.
        relative_position: add a learnt bias in every attention. Fixes the input to `image_size`.
        layer_scale: initial value of a learnt factor per channel on every residual branch; `None` for none.
        norm_eps: of every LayerNorm (1e-6 when pre-training and classifying, 1e-5 in dense tasks).
        position_image_size: image size that the absolute table is made for, if it is not `image_size`.

    Raises:
        InputError: when a size is not a multiple of 16.
    """

    def __init__(
        self,
        shape: HiViTShape,
        *,
        image_size: int,
        drop_path: float = 0.0,
        absolute_position: bool = True,
        relative_position: bool = False,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        position_image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.image_size = shape, image_size
        self.grid_side, self.has_axes = units_per_side(image_size), False
        depth4, depth8, _ = shape.depths
        width4, width8, width16 = shape.widths
        # One line over the blocks of all three stages (base 30 values, large 44); merges drop nothing.
        drop_ratios = self.drop_ratios = _drop_ratios(drop_path, sum(shape.depths))

        def channel_blocks(width: int, ratios: list[float]) -> nn.ModuleList:
            return nn.ModuleList(
                ChannelBlock(
                    width,
                    shape.early_mlp_ratio,
                    norm_eps=norm_eps,
                    drop_ratio=ratio,
                    layer_scale=layer_scale,
                )
                for ratio in ratios
            )

        self.stem = Stem(width4, norm_eps=norm_eps)
        self.stage4 = channel_blocks(width4, drop_ratios[:depth4])
        self.merge4to8 = Merge(width4, norm_eps=norm_eps)
        self.stage8 = channel_blocks(width8, drop_ratios[depth4 : depth4 + depth8])
        self.merge8to16 = Merge(width8, norm_eps=norm_eps)
        self.absolute_position: nn.Parameter | None = None
        if absolute_position:
            side = units_per_side(position_image_size or image_size)
            self.absolute_position = nn.Parameter(torch.zeros(1, side * side, width16))
            nn.init.trunc_normal_(self.absolute_position, std=0.02)
        self.stage16 = nn.ModuleList(
            AttentionBlock(
                width16,
                shape.num_heads,
                shape.mlp_ratio,
                norm_eps=norm_eps,
                drop_ratio=ratio,
                layer_scale=layer_scale,
                relative_grid=self.grid_side if relative_position else None,
            )
            for ratio in drop_ratios[depth4 + depth8 :]
        )
        self.relative_index_NN: Tensor | None
        # Not in the state: it follows from the grid, and weights must load into networks of other grids.
        index_NN = relative_index(self.grid_side) if relative_position else None
        self.register_buffer("relative_index_NN", index_NN, persistent=False)
        init_weights(self, shape.init_gain)

    def use_axis_positions(self, side: int) -> None:
        """Give every attention tables of positions per row and per column, for images of any size.

        Args:
            side: units per side that the tables are made for.
        """
        self.has_axes = True
        for block in self.stage16:
            block.attn = AxisAttention(self.widths[-1], self.shape.num_heads, side)
            init_weights(block.attn, self.shape.init_gain)

    @property
    def num_blocks(self) -> int:
        """Blocks of the three stages; merges are not counted."""
        return sum(self.shape.depths)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels at strides 4, 8 and 16."""
        return self.shape.widths

    def forward_stages(self, images_BCHW: Tensor, kept_BK: Tensor | None = None) -> StageFeatures:
        """Run all stages on the whole image, or on some of its units only.

        Args:
            images_BCHW: (B, 3, H, W), H and W multiples of 16, normalised.
            kept_BK: indices of the units to keep, per image and in any order; features keep that order.

        Raises:
            InputError: when H or W does not fit the network.
        """
        stages = self.before_stage16(images_BCHW, kept_BK)
        x_BNC = stages.level16_BNC
        where = self._grid(images_BCHW) if self.has_axes else self.relative_rows(kept_BK)
        for block in self.stage16:
            x_BNC = block(x_BNC, where)
        return stages._replace(level16_BNC=x_BNC)

    def before_stage16(
        self, images_BCHW: Tensor, kept_BK: Tensor | None = None, hidden: HiddenUnits | None = None
    ) -> StageFeatures:
        """As `forward_stages`, but level 16 is the input of its first block.

        Args:
            hidden: units that keep their place and position, but not their content, at level 16 only.
        """
        grid = self._grid(images_BCHW)
        x = level4_BNhhC = _run(self.stage4, self.stem(images_BCHW, kept_BK))
        x = level8_BNhhC = _run(self.stage8, self.merge4to8(x))
        x_BNC = self.merge8to16(x).flatten(1, 3)  # (B, N, 1, 1, C) -> (B, N, C): one token per unit
        if hidden is not None:
            w_BN1 = hidden.mask_BN.unsqueeze(-1).to(x_BNC.dtype)
            x_BNC = x_BNC * (1 - w_BN1) + hidden.token_11C.to(x_BNC.dtype) * w_BN1
        if self.absolute_position is not None:
            x_BNC = x_BNC + self._positions(grid, kept_BK)
        return StageFeatures(level4_BNhhC, level8_BNhhC, x_BNC)

    def _grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        """Units per column and per row of these images."""
        grid = grid_of(images_BCHW, self.shape.name)
        if self.relative_index_NN is not None and grid != (self.grid_side, self.grid_side):
            raise InputError(
                f"The relative position bias is built for {self.image_size} x {self.image_size} pixels, "
                f"but the images have {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]}",
                where=self.shape.name,
                fix="resize the images, or build the network with their image_size (tables are resized "
                "when weights are loaded) or without relative positions",
            )
        return grid

    def _positions(self, grid: tuple[int, int], kept_BK: Tensor | None) -> Tensor:
        """Rows of the absolute table for the units present: (1, N, C) or (B, K, C)."""
        assert self.absolute_position is not None
        table_1NC: Tensor = self.absolute_position
        num_tokens = grid[0] * grid[1] if kept_BK is None else kept_BK.shape[1]
        # The released pre-training compares the table with the number of tokens *present* (49 of 196): with
        # masked units it resamples a table of the right size too (by 14.1/14). Probably an accident, but the
        # released weights were trained with it and the golden numbers contain it.
        if num_tokens != table_1NC.shape[1] or grid[0] != grid[1]:
            table_1NC = resample_positions(table_1NC, grid)
        return table_1NC if kept_BK is None else table_1NC[0][kept_BK]

    def relative_rows(self, kept_BK: Tensor | None = None) -> Tensor | None:
        """Rows of the bias tables for the units present: (N, N) or (B, K, K); `None` without tables."""
        index_NN = self.relative_index_NN
        if index_NN is None or kept_BK is None:
            return index_NN
        return index_NN[kept_BK[:, :, None], kept_BK[:, None, :]]


# Searched, not matched from the start: names come with the prefixes of whatever wraps the network, such as
# `backbone.network.` in detectors.
_BACKBONE_NAME = re.compile(
    r"(?:^|\.)(stem|absolute_position|stage4|stage8|stage16|merge4to8|merge8to16)(?:\.(\d+))?(?:\.|$)"
)


def _block_number(name: str, depths: tuple[int, int, int], merges_counted: bool) -> int | None:
    """1-based number of the block that owns a parameter; 0 for stem and position; `None` outside."""
    found = _BACKBONE_NAME.search(name)
    if found is None:
        return None
    part, index = found[1], int(found[2] or 0)
    depth4, depth8, _ = depths
    # 1 where a merge is an entry of the block list, as in the released list (base: 3 and 7 are merges).
    merge = int(merges_counted)
    return {
        "stem": 0,
        "absolute_position": 0,
        "stage4": index + 1,
        "merge4to8": depth4 + merge,
        "stage8": depth4 + merge + index + 1,
        "merge8to16": depth4 + depth8 + 2 * merge,
        "stage16": depth4 + depth8 + 2 * merge + index + 1,
    }[part]


def layer_index(name: str, depths: tuple[int, int, int]) -> int:
    """Layer id of a parameter for the layer-wise lr decay of fine-tuning: 0 ... L, L = blocks + 1.

    Stem and absolute position 0, block k its 1-based number, a merge that of the block before it,
    everything else (the head) L. The lr is multiplied by `(d^(13/L))^(L - id)`: the published decay d is
    stated for a 12-block ViT, hence the exponent.
    """
    number = _block_number(name, depths, merges_counted=False)
    return sum(depths) + 1 if number is None else number


def dense_layer_index(name: str, depths: tuple[int, int, int], task: Task) -> int:
    """Layer id of a parameter in detection and segmentation: here a merge counts as a block of its own.

    Everything outside the stages (pyramid, heads) has id T - 1, T = blocks + 2; so has the absolute
    position in detection, while in segmentation it has 0. The last two blocks get ids T - 1 and T.
    """
    # So the last block learns faster than the heads, by 1 / factor: 1.11 (base) and 1.05 (large) times the
    # base lr in detection, 1.04 and 1.015 in segmentation. A quirk of the released configurations, kept for
    # reproduction.
    if task == "detect" and re.search(r"(?:^|\.)absolute_position$", name):
        return sum(depths) + 1
    number = _block_number(name, depths, merges_counted=True)
    return sum(depths) + 1 if number is None else number


def _drop_ratios(last: float, num_blocks: int) -> list[float]:
    """Linear from 0 to `last`, both ends included; a single block gets 0."""
    return [last * index / max(num_blocks - 1, 1) for index in range(num_blocks)]


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
