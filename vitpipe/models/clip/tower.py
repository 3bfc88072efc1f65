"""The image tower of CLIP: a pre-norm vision transformer with a class token and a projection.

Learning Transferable Visual Models From Natural Language Supervision; Alec Radford et al.; arXiv 2103.00020,
section 2.4 and table 20; names and details as in the released code. Here it is a teacher: never trained,
patch tokens instead of the class token.

    patches > + class token, positions > norm > blocks > norm > projection > patch tokens

Shapes: B images, N patches (row-major), C channels, D channels behind the projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import AttentionBlock, Mlp
from vitpipe.models.positions import resample_positions

# Of CLIP's own pixels; a released tower has seen no others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Activation = Literal["quick_gelu", "gelu"]
_EPS = 1e-5  # torch's default, which CLIP leaves
_MLP_RATIO = 4


@dataclass(frozen=True)
class TowerShape:
    """One size of tower.

    Attributes:
        name: as recipes give it.
        patch: pixels per side of a patch.
        width: C.
        depth: blocks.
        num_heads: of each block.
        out_width: D.
    """

    name: str
    patch: int
    width: int
    depth: int
    num_heads: int
    out_width: int

    def __str__(self) -> str:
        sizes = f"{self.depth} blocks of {self.width} channels, projection to {self.out_width}"
        return f"{self.name} (patches of {self.patch} pixels, {sizes})"


# The released ViT-L/14 for 336 pixels is `clip_l14` with a larger table of positions.
TOWERS: dict[str, TowerShape] = {
    shape.name: shape
    for shape in (
        TowerShape("clip_b16", 16, 768, 12, 12, 512),
        TowerShape("clip_l14", 14, 1024, 24, 16, 768),
        # Ours, with random weights, for demo and tests: what it computes of an image means nothing.
        TowerShape("random", 16, 64, 2, 2, 32),
    )
}


class QuickMlp(Mlp):
    """Linear, `x * sigmoid(1.702 x)`, Linear: the GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class ClipTower(nn.Module):
    """The tower.

    Args:
        shape: an entry of `TOWERS`.
        grid_side: patches per side that the position table is made for; others get it resampled.
        activation: `quick_gelu` of OpenAI's weights, or `gelu` of most that OpenCLIP has trained.
    """

    def __init__(
        self, shape: TowerShape, *, grid_side: int = 14, activation: Activation = "quick_gelu"
    ) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.patches = nn.Conv2d(3, width, shape.patch, stride=shape.patch, bias=False)
        # The released initial values: only a random teacher keeps them.
        scale = width**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(width))
        self.positions = nn.Parameter(scale * torch.randn(1 + grid_side**2, width))
        self.norm_before = nn.LayerNorm(width, eps=_EPS)
        blocks = [
            AttentionBlock(width, shape.num_heads, _MLP_RATIO, norm_eps=_EPS) for _ in range(shape.depth)
        ]
        if activation == "quick_gelu":
            for block in blocks:
                block.mlp = QuickMlp(width, _MLP_RATIO * width)
        self.blocks = nn.ModuleList(blocks)
        self.norm_after = nn.LayerNorm(width, eps=_EPS)
        self.projection = nn.Parameter(scale * torch.randn(width, shape.out_width))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W), normalised with CLIP's mean and std -> projected patch tokens (B, N, D).

        Raises:
            InputError: when H or W is no multiple of the patch.
        """
        patch, (height, breadth) = self.shape.patch, images_BCHW.shape[-2:]
        if height % patch or breadth % patch:
            raise InputError(
                f"The teacher {self.shape.name} cuts patches of {patch} pixels, which do not divide images "
                f"of {height} x {breadth}",
                where="teacher",
                fix=f"give images whose sides are multiples of {patch}",
            )
        x_BNC = self.patches(images_BCHW).flatten(2).transpose(1, 2)
        class_B1C = self.class_token.to(x_BNC.dtype).expand(len(x_BNC), 1, -1)
        x_BNC = torch.cat([class_B1C, x_BNC], dim=1)
        x_BNC = self.norm_before(x_BNC + self._positions((height // patch, breadth // patch)))
        for block in self.blocks:
            x_BNC = block(x_BNC)
        return self.norm_after(x_BNC[:, 1:]) @ self.projection

    @torch.no_grad()
    def targets(self, images_BCHW: Tensor) -> Tensor:
        """As `forward`, each token normalised over its channels, in float32: iTPN's target (B, N, D)."""
        tokens_BND = self(images_BCHW).float()
        return F.layer_norm(tokens_BND, tokens_BND.shape[-1:])

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1 + N, C) for a grid."""
        side = math.isqrt(len(self.positions) - 1)
        if grid == (side, side):
            return self.positions
        resampled_1NC = resample_positions(self.positions[None, 1:], grid)
        return torch.cat([self.positions[:1], resampled_1NC[0]])
