"""The plain vision transformer: patches, positions, blocks of global attention.

An Image is Worth 16x16 Words; Alexey Dosovitskiy et al.; arXiv 2010.11929, with the sizes of DeiT (Touvron
et al., arXiv 2012.12877). With a class token and a last norm as in DINO (Caron et al., arXiv 2104.14294);
without both as in SelfPatch (Yun et al., Patch-level Representation Learning for Self-supervised Vision
Transformers, CVPR 2022), whose class token looks at the finished patches (see `models.class_attention`).
drloc (Liu et al., Efficient Training of Visual Transformers with Small Datasets, NeurIPS 2021) takes another
public implementation, which differs in what `ViTShape` has behind the number of heads.

Shapes: B images, N = rows * columns patches in row-major order, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import AttentionBlock, init_weights
from vitpipe.models.positions import class_sincos_table, resample_positions

NORM_EPS = 1e-6  # of all norms in the networks of DINO and its successors
Positions = Literal["learned", "sincos", "none"]


@dataclass(frozen=True)
class ViTShape:
    """One size.

    Attributes:
        init_gain: that of `init_weights`.
        mlp_ratio: hidden width of the MLPs over the width.
        qkv_bias: of the layers of queries, keys and values.
        norm_eps: of all norms.
        dropout: ratio behind the last layer of every attention and both of every MLP.
        torch_init: linear layers keep torch's initial values, class token and positions are standard normal.
        tokens_decay: weight decay for class token and positions, too.
    """

    name: str
    width: int
    depth: int
    num_heads: int
    init_gain: float | None = None
    mlp_ratio: int = 4
    qkv_bias: bool = True
    norm_eps: float = NORM_EPS
    dropout: float = 0.0
    torch_init: bool = False
    tokens_decay: bool = False


SHAPES: dict[str, ViTShape] = {
    shape.name: shape
    for shape in (
        # Ours. 64 channels need initial values by fan-in, see `init_weights`.
        ViTShape("vit_nano", 64, 4, 4, init_gain=1.0),
        ViTShape("vit_tiny", 192, 12, 3),
        ViTShape("vit_small", 384, 12, 6),
        ViTShape("vit_base", 768, 12, 12),
        ViTShape("vit_large", 1024, 24, 16),
        # As drloc's released code trains it from scratch.
        ViTShape(
            "vit_base_drloc",
            768,
            12,
            12,
            qkv_bias=False,
            norm_eps=1e-5,
            dropout=0.1,
            torch_init=True,
            tokens_decay=True,
        ),
    )
}


class BlockOutputs(NamedTuple):
    """Outputs of some blocks, in the order of asking, without the last norm.

    Attributes:
        patches: (B, N, C) each.
        class_tokens: (B, C) each; empty without a class token.
        attention: (B, H, Q, Q) each, Q = N, or N + 1 with the class token first, where it was asked for.
    """

    patches: tuple[Tensor, ...]
    class_tokens: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]


class ViT(nn.Module):
    """Trunk: patch embedding > + position > blocks > last norm, where there is one.

    Args:
        shape: width, depth, heads.
        image_size: pixels per side that the position table is made for.
        patch_size: pixels per side of a patch.
        class_token: with a token that stands for the image.
        last_norm: with a LayerNorm behind the last block; `norm` is an identity without it.
        num_heads: the shape's if not given.
        position: of the patches; a fixed table is a buffer.
        has_offset: how the table is resized, see `resample_positions`.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.
    """

    def __init__(
        self,
        shape: ViTShape,
        *,
        image_size: int,
        patch_size: int = 16,
        class_token: bool = True,
        last_norm: bool = True,
        num_heads: int | None = None,
        position: Positions = "learned",
        has_offset: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.patch_size, self.has_offset = shape, patch_size, has_offset
        self.num_heads = num_heads or shape.num_heads
        if image_size % patch_size or shape.width % self.num_heads:
            raise InputError(
                f"{shape.name} cannot be built for {image_size} pixels, patches of {patch_size} and "
                f"{self.num_heads} heads",
                where="model",
                fix=f"image_size has to be a multiple of patch_size, and heads a divisor of {shape.width}",
            )
        side, width = image_size // patch_size, shape.width
        self.patch_embed = self._patch_embed()
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self._add_positions(position, side, has_class=class_token)
        rates = [drop_path * number / max(1, shape.depth - 1) for number in range(shape.depth)]
        self.blocks = nn.ModuleList(
            AttentionBlock(
                width,
                self.num_heads,
                shape.mlp_ratio,
                norm_eps=shape.norm_eps,
                drop_ratio=rate,
                qkv_bias=shape.qkv_bias,
                dropout=shape.dropout,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=shape.norm_eps) if last_norm else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        if not self.shape.torch_init:
            init_weights(self, self.shape.init_gain)
        for token in (self.class_token, self.class_position, self.position):
            if isinstance(token, nn.Parameter) and self.shape.torch_init:
                nn.init.normal_(token)
            elif isinstance(token, nn.Parameter):
                nn.init.trunc_normal_(token, std=0.02)

    def _patch_embed(self) -> nn.Module:
        """(B, 3, H, W) -> (B, C, rows, columns)."""
        # Left at torch's initial values, as in the released code.
        return nn.Conv2d(3, self.shape.width, kernel_size=self.patch_size, stride=self.patch_size)

    def _add_positions(self, kind: Positions, side: int, *, has_class: bool) -> None:
        """Tables (1, N, C) for the patches and (1, 1, C) for the class token; `None` for none."""
        self.position: Tensor | None
        self.class_position: Tensor | None
        width = self.shape.width
        if kind == "learned":
            self.position = nn.Parameter(torch.empty(1, side * side, width))
            self.class_position = nn.Parameter(torch.empty(1, 1, width)) if has_class else None
        elif kind == "sincos":
            # The class token's entry is 0 (MoCo-v3) and not kept.
            self.register_buffer("position", class_sincos_table(side, width))
            self.class_position = None
        else:
            self.position = self.class_position = None

    def grid_of(self, images_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            InputError: when a side is no multiple of the patch.
        """
        height, width = images_BCHW.shape[2:]
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"{self.shape.name} with patches of {self.patch_size} pixels cannot take an image of "
                f"{height} x {width} pixels",
                where="image_size, and sizes of crops",
                fix=f"use sides that are multiples of {self.patch_size}",
            )
        return height // self.patch_size, width // self.patch_size

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid: (1, rows * columns, C)."""
        assert self.position is not None
        side = math.isqrt(self.position.shape[1])
        # The offset moves the sample points, so the table's own grid must not go through it.
        if grid == (side, side):
            return self.position
        return resample_positions(self.position, grid, has_offset=self.has_offset)

    def embedded(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> what the first block reads: (B, N, C), or (B, 1 + N, C) with a class token."""
        grid = self.grid_of(images_BCHW)
        x_BNC = self.patch_embed(images_BCHW).flatten(2).transpose(1, 2)
        if self.position is not None:
            x_BNC = x_BNC + self.positions_for(grid)
        if self.class_token is None:
            return x_BNC
        first_11C: Tensor = self.class_token
        if self.class_position is not None:
            first_11C = first_11C + self.class_position
        return torch.cat([first_11C.expand(len(x_BNC), -1, -1), x_BNC], dim=1)

    def forward(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> BlockOutputs:
        """(B, 3, H, W) -> outputs of some blocks, numbered from 0 or, negative, from the last."""
        x_BMC = self.embedded(images_BCHW)
        wanted = [block % len(self.blocks) for block in blocks]
        outputs: dict[int, Tensor] = {}
        shares: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            assert isinstance(block, AttentionBlock)
            if attention and number in wanted:
                shares[number] = block.attention(x_BMC)
            x_BMC = block(x_BMC)
            if number in wanted:
                outputs[number] = x_BMC
        first = 0 if self.class_token is None else 1
        return BlockOutputs(
            tuple(outputs[number][:, first:] for number in wanted),
            tuple(outputs[number][:, 0] for number in wanted) if first else (),
            tuple(shares[number] for number in wanted) if attention else (),
        )
