"""CvT: convolutions embed the tokens of each stage, and make queries, keys and values.

CvT: Introducing Convolutions to Vision Transformers; Haiping Wu et al.; arXiv 2103.15808. This is the public
re-implementation that drloc (Efficient Training of Visual Transformers with Small Datasets, Yahui Liu et al.,
NeurIPS 2021) trains, not the authors' own network: no class token, keys and values from one convolution,
norms that divide by the standard deviation, no norm behind the last block.

    image > [embedding > norm > blocks] three times, at strides 4, 8 and 16

Nothing depends on the grid. Initial values are torch's own everywhere, which also fit narrow networks.

Shapes: B images, C channels, R rows and S columns of tokens, H heads, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import attend, drop_path

STRIDE = 16  # pixels of a token of the last stage
NUM_STAGES = 3
_NORM_EPS = 1e-5
_FF_RATIO = 4
# Kernel, stride and padding of the embeddings.
_EMBEDDINGS = ((7, 4, 3), (3, 2, 1), (3, 2, 1))
Three = tuple[int, int, int]


@dataclass(frozen=True)
class CvtShape:
    """One size.

    Attributes:
        widths: channels of the three stages.
        depths: blocks of each stage.
        heads: of each stage.
        head_width: channels of a head.
    """

    name: str
    widths: Three
    depths: Three
    heads: Three
    head_width: int = 64

    @property
    def num_blocks(self) -> int:
        """Of all stages."""
        return sum(self.depths)


SHAPES: dict[str, CvtShape] = {
    shape.name: shape
    for shape in (
        CvtShape("cvt_nano", (16, 32, 64), (1, 1, 2), (1, 2, 4), head_width=16),
        CvtShape("cvt_13", (64, 192, 384), (1, 2, 10), (1, 3, 6)),
    )
}


class ChannelNorm(nn.Module):
    """`(x - mean) / (std + eps) * g + b` over the channels of each token: (B, C, R, S) -> (B, C, R, S).

    Args:
        width: C.
    """

    # Of four dimensions as in released weights, and therefore with weight decay, unlike other norms'
    # parameters: drloc's optimiser exempts those of one dimension (`optim.groups` has the same rule).
    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x_BCRS: Tensor) -> Tensor:
        """(B, C, R, S) -> (B, C, R, S), in float32."""
        x_BCRS = x_BCRS.float()
        # eps is added to the deviation, not to the variance as in LayerNorm.
        std_B1RS, mean_B1RS = torch.std_mean(x_BCRS, dim=1, correction=0, keepdim=True)
        return (x_BCRS - mean_B1RS) / (std_B1RS + _NORM_EPS) * self.g + self.b


def _projection(width: int, out_width: int, stride: int) -> nn.Sequential:
    """A depthwise 3 x 3 convolution, batch norm, and a linear layer on channels."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, out_width, 1, bias=False),
    )


class ConvAttention(nn.Module):
    """Attention of all tokens to keys and values on a grid of half the sides, rounded up.

    Args:
        width: C.
        num_heads: H.
        head_width: c.
    """

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_width
        self.to_q = _projection(width, inner, stride=1)
        # Outputs are ordered key, value, then head, then channel of the head, as in released weights.
        self.to_kv = _projection(width, 2 * inner, stride=2)
        self.to_out = nn.Conv2d(inner, width, 1)

    def forward(self, x_BCRS: Tensor) -> Tensor:
        """(B, C, R, S) -> (B, C, R, S)."""
        grid = x_BCRS.shape[2:]
        q_BHNc = self._heads(self.to_q(x_BCRS))
        k_BHMc, v_BHMc = map(self._heads, self.to_kv(x_BCRS).chunk(2, dim=1))
        out_BHcN = attend(q_BHNc, k_BHMc, v_BHMc).transpose(2, 3)
        return self.to_out(out_BHcN.flatten(1, 2).unflatten(2, grid))

    def _heads(self, x_BDRS: Tensor) -> Tensor:
        """(B, H * c, R, S) -> (B, H, N, c)."""
        return x_BDRS.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)


class CvtBlock(nn.Module):
    """`x + attention(norm x)`, then `x + ff(norm x)`; one drop ratio for both, drawn separately."""

    def __init__(self, width: int, num_heads: int, head_width: int, drop_ratio: float) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio
        self.norm1 = ChannelNorm(width)
        self.attn = ConvAttention(width, num_heads, head_width)
        self.norm2 = ChannelNorm(width)
        self.fc1 = nn.Conv2d(width, _FF_RATIO * width, 1)
        self.fc2 = nn.Conv2d(_FF_RATIO * width, width, 1)

    def forward(self, x_BCRS: Tensor) -> Tensor:
        """(B, C, R, S) -> (B, C, R, S)."""
        x_BCRS = x_BCRS + drop_path(self.attn(self.norm1(x_BCRS)), self.drop_ratio, self.training)
        branch_BCRS = self.fc2(F.gelu(self.fc1(self.norm2(x_BCRS))))
        return x_BCRS + drop_path(branch_BCRS, self.drop_ratio, self.training)


class CvtStage(nn.Module):
    """Embedding, norm, blocks.

    Args:
        in_width: channels of what it gets.
        shape: the network's size.
        stage: 0, 1 or 2.
        drop_ratios: of its blocks.
    """

    def __init__(self, in_width: int, shape: CvtShape, stage: int, drop_ratios: list[float]) -> None:
        super().__init__()
        width, (kernel, stride, padding) = shape.widths[stage], _EMBEDDINGS[stage]
        self.embed = nn.Conv2d(in_width, width, kernel, stride=stride, padding=padding)
        self.norm = ChannelNorm(width)
        self.blocks = nn.ModuleList(
            CvtBlock(width, shape.heads[stage], shape.head_width, ratio) for ratio in drop_ratios
        )


class CvT(nn.Module):
    """The network without a head.

    Args:
        shape: one of `SHAPES`.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.
    """

    def __init__(self, shape: CvtShape, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        rates = [drop_path * number / max(1, shape.num_blocks - 1) for number in range(shape.num_blocks)]
        ends = [sum(shape.depths[: stage + 1]) for stage in range(NUM_STAGES)]
        self.stages = nn.ModuleList(
            CvtStage(in_width, shape, stage, rates[end - shape.depths[stage] : end])
            for stage, (in_width, end) in enumerate(zip((3, *shape.widths), ends, strict=False))
        )

    def forward(self, images_BCHW: Tensor, blocks: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """(B, 3, H, W) -> the last block's map (B, C, R, S), and those of some blocks by their numbers.

        Raises:
            InputError: when a side is below 16 pixels.
        """
        if min(images_BCHW.shape[-2:]) < STRIDE:
            height, width = images_BCHW.shape[-2:]
            raise InputError(
                f"{self.shape.name} cannot take an image of {height} x {width} pixels",
                where="image_size, and sizes of crops",
                fix=f"use sides of at least {STRIDE} pixels",
            )
        found: dict[int, Tensor] = {}
        x_BCRS, number = images_BCHW, 0
        for stage in self.stages:
            assert isinstance(stage, CvtStage)
            x_BCRS = stage.norm(stage.embed(x_BCRS))
            for block in stage.blocks:
                x_BCRS = block(x_BCRS)
                if number in blocks:
                    found[number] = x_BCRS
                number += 1
        return x_BCRS, found
