"""A plain vision transformer whose tokens can be dropped, and lifted to the levels of a hierarchical network.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735, supplement, section
3: outputs of the 4th and of the 7th block of ViT-B/16 are up-sampled by 4 and by 2, and give with the last
one the features that the pyramid is built from. No code of it was released. Ours: a token is opened into its
children by the pyramid's own `Split`, once for 2 and twice for 4, because an operation on neighbouring tokens
would let hidden units leak; the lifted levels have the widths of HiViT-B.

    patches > + position > blocks 1-4 > blocks 5-7 > blocks 8-12 > level 16
                                 |            \\-- lift8 > level 8
                                 \\-- lift4 > level 4

Shapes: B images, N units of 16 x 16 pixels (row-major), K units that are kept, h sub-tokens per side of a
unit (4, 2, 1 at strides 4, 8, 16), C channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import AttentionBlock, init_weights
from vitpipe.models.hivit.hivit import StageFeatures
from vitpipe.models.hivit.pyramid import Split
from vitpipe.models.masking import UNIT_PIXELS, gather_units, units_per_side
from vitpipe.models.positions import relative_index
from vitpipe.models.vit.vit import NORM_EPS, ViT, ViTShape

# Of 12 blocks, counted from 1: whose outputs become levels 4 and 8.
_LIFTED, _OF_BLOCKS = (4, 7), 12


@dataclass(frozen=True)
class UnitViTShape:
    """One size.

    Attributes:
        trunk: width, depth, heads.
        lifted: channels at strides 4 and 8.
    """

    trunk: ViTShape
    lifted: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Numbers from 0 of the blocks that give levels 4, 8 and 16."""
        depth = self.trunk.depth
        level4, level8 = (max(1, round(depth * number / _OF_BLOCKS)) - 1 for number in _LIFTED)
        return level4, level8, depth - 1


SHAPES: dict[str, UnitViTShape] = {
    shape.trunk.name: shape
    for shape in (
        # Ours. 64 channels need initial values by fan-in, see `init_weights`.
        UnitViTShape(ViTShape("itpn_vit_nano", 64, 4, 4, init_gain=1.0), lifted=(16, 32)),
        # The widths of the lifted levels are not published: HiViT-B's, which keep the pyramid's shapes.
        UnitViTShape(ViTShape("itpn_vit_base", 768, 12, 12), lifted=(128, 256)),
    )
}


class UnitViT(ViT):
    """Trunk without class token and last norm.

    Args:
        shape: an entry of `SHAPES` or your own.
        image_size: pixels per side, a multiple of 16; fixes the grid of the relative bias.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.
        relative_position: add a learnt bias in every attention. Fixes the input to `image_size`.
        lifts: with what makes levels 4 and 8.
        norm_eps: of every LayerNorm.
        position_image_size: image size that the absolute table is made for, if it is not `image_size`.

    Raises:
        InputError: when a size is not a multiple of 16.
    """

    def __init__(
        self,
        shape: UnitViTShape,
        *,
        image_size: int,
        drop_path: float = 0.0,
        relative_position: bool = False,
        lifts: bool = False,
        norm_eps: float = NORM_EPS,
        position_image_size: int | None = None,
    ) -> None:
        trunk = replace(shape.trunk, norm_eps=norm_eps)
        self.grid_side = units_per_side(image_size)
        units_per_side(position_image_size or image_size)
        super().__init__(
            trunk,
            image_size=position_image_size or image_size,
            patch_size=UNIT_PIXELS,
            class_token=False,
            last_norm=False,
            drop_path=drop_path,
        )
        self.image_size, self.level_blocks = image_size, shape.blocks
        self.widths = (*shape.lifted, trunk.width)
        self.lift4: nn.Module | None = None
        self.lift8: nn.Module | None = None
        if lifts:
            width4, width8 = shape.lifted
            self.lift8 = Split(trunk.width, width8, norm_eps=norm_eps)
            # By way of stride 8, with the width that a token has there.
            self.lift4 = nn.Sequential(
                Split(trunk.width, width8, norm_eps=norm_eps), Split(width8, width4, norm_eps=norm_eps)
            )
            init_weights(self.lift4, trunk.init_gain)
            init_weights(self.lift8, trunk.init_gain)
        # Not in the state: it follows from the grid.
        index_NN = relative_index(self.grid_side) if relative_position else None
        self.relative_index_NN: Tensor | None
        self.register_buffer("relative_index_NN", index_NN, persistent=False)
        for block in self.blocks if relative_position else ():
            assert isinstance(block, AttentionBlock)
            num_rows = (2 * self.grid_side - 1) ** 2
            block.attn.relative_table = nn.Parameter(torch.zeros(num_rows, self.num_heads))

    def _patch_embed(self) -> nn.Module:
        """(B, 3, H, W) -> (B, C, rows, columns)."""
        # A name of its own, by which weights are told from those of the family vit.
        return nn.Sequential(super()._patch_embed())

    @property
    def absolute_position(self) -> nn.Parameter:
        """The learnt table (1, N, C)."""
        assert isinstance(self.position, nn.Parameter)
        return self.position

    def grid_of(self, images_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of units.

        Raises:
            InputError: when a side is no multiple of 16, or not that of the relative bias.
        """
        grid = super().grid_of(images_BCHW)
        if self.relative_index_NN is not None and grid != (self.grid_side, self.grid_side):
            raise InputError(
                f"The relative position bias is built for {self.image_size} x {self.image_size} pixels, "
                f"but the images have {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]}",
                where=self.shape.name,
                fix="resize the images, or build the network with their image_size (tables are resized "
                "when weights are loaded) or without relative positions",
            )
        return grid

    def outputs(
        self, images_BCHW: Tensor, blocks: Sequence[int], kept_BK: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Outputs of some blocks, (B, N, C) each, or (B, K, C) of the units that are kept.

        Args:
            images_BCHW: (B, 3, H, W), H and W multiples of 16, normalised.
            blocks: numbers from 0.
            kept_BK: indices of the units to keep, per image and in any order; outputs keep that order.

        Raises:
            InputError: as `grid_of`.
        """
        x_BNC, rows = self.embedded(images_BCHW), self.relative_index_NN
        if kept_BK is not None:
            x_BNC = gather_units(x_BNC, kept_BK)
            rows = None if rows is None else rows[kept_BK[:, :, None], kept_BK[:, None, :]]
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            x_BNC = block(x_BNC, rows)
            if number in blocks:
                found[number] = x_BNC
        return tuple(found[number] for number in blocks)

    def forward_stages(self, images_BCHW: Tensor, kept_BK: Tensor | None = None) -> StageFeatures:
        """The three levels that the pyramid is built from; needs `lifts`.

        Raises:
            InputError: as `outputs`.
        """
        assert self.lift4 is not None
        assert self.lift8 is not None
        out4_BNC, out8_BNC, x16_BNC = self.outputs(images_BCHW, self.level_blocks, kept_BK)
        return StageFeatures(
            self.lift4(out4_BNC[:, :, None, None, :]), self.lift8(out8_BNC[:, :, None, None, :]), x16_BNC
        )


def layer_index(name: str, depth: int) -> int:
    """Layer id of a parameter: patches and positions 0, block k its 1-based number, all else `depth` + 1.

    All else are heads, pyramid, and what lifts tokens to its levels.
    """
    if found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if re.search(r"(?:^|\.)(patch_embed|position)(?:\.|$)", name) else depth + 1
