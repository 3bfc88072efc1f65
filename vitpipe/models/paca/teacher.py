"""The external clustering teacher: a light convolutional pyramid that assigns the patches of all stages.

Grainger et al., PaCa-ViT (CVPR 2023), supplement, figure 8; details as in the released code, whose parameter
names and shapes the released weights have: blurred downsampling, upsampling before the lateral convolution.
It is trained together with the network; nothing is distilled.

    O1 > down > O2 > down > O3 > down > O4           side outputs T = O
     |           |           |           |
    P1 <- up -- P2 <- up -- P3 <- up -- P4           assignments from P

Shapes: B images, C channels, M clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.paca.clustering import as_tokens, assigned

_KERNEL = 7


class TeacherOutputs(NamedTuple):
    """Of each stage: shares (B, M, N), and the tokens (B, N, C) that are added behind its last block."""

    assignments: tuple[Tensor, ...]
    side_tokens: tuple[Tensor, ...]


class ConvLayer(nn.Module):
    """`x + norm(GELU(depthwise 7 x 7))`, then norm(GELU(1 x 1)): ConvMixer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y_BCHW = x_BCHW + self.norm1(F.gelu(self.depthwise(x_BCHW)))
        out: Tensor = self.norm2(F.gelu(self.pointwise(y_BCHW)))
        return out


class BlurredDown(nn.Module):
    """Blur every channel, then a 3 x 3 convolution of stride 2, GELU and norm (Zhang, arXiv 1904.11486)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        # Written with the weights as in the released ones, although it is a constant.
        self.register_buffer("blur", (torch.outer(line, line) / 16).expand(width, 1, 3, 3).clone())
        self.conv = nn.Conv2d(width, out_width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""
        assert isinstance(self.blur, Tensor)
        smooth = F.conv2d(x_BCHW, self.blur.to(x_BCHW.dtype), padding=1, groups=x_BCHW.shape[1])
        out: Tensor = self.norm(F.gelu(self.conv(smooth)))
        return out


class Lateral(nn.Module):
    """A 1 x 1 convolution of the upsampled coarser map, GELU and norm."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, 1)
        self.norm = nn.BatchNorm2d(out_width)

    def forward(self, coarse_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C', H, W)."""
        # Upsampled first, as in the released code: the order matters by the nonlinearity.
        large = F.interpolate(coarse_BCHW, size=size, mode="bilinear", align_corners=False)
        out: Tensor = self.norm(F.gelu(self.conv(large)))
        return out


class ClusteringTeacher(nn.Module):
    """Reads the stem's output, and assigns the patches of every stage.

    Args:
        widths, depths, clusters: of the stages.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], clusters: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvLayer(width) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        pairs = list(pairwise(widths))
        self.downs = nn.ModuleList(BlurredDown(fine, coarse) for fine, coarse in pairs)
        self.laterals = nn.ModuleList(Lateral(coarse, fine) for fine, coarse in pairs)
        self.fused = nn.ModuleList(ConvLayer(fine) for fine, _ in pairs)
        self.to_clusters = nn.ModuleList(
            nn.Conv2d(width, number, 1) for width, number in zip(widths, clusters, strict=True)
        )

    def forward(self, stem_BCHW: Tensor) -> TeacherOutputs:
        """(B, C, H / 4, W / 4) -> assignments and side tokens of the four stages."""
        bottom_up = [self.stages[0](stem_BCHW)]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            bottom_up.append(stage(down(bottom_up[-1])))
        top_down = [bottom_up[-1]]
        for level in reversed(range(len(self.laterals))):
            fine = bottom_up[level]
            lateral = self.laterals[level](top_down[0], fine.shape[-2:])
            top_down.insert(0, self.fused[level](fine + lateral))
        scores = [conv(x).flatten(2) for conv, x in zip(self.to_clusters, top_down, strict=True)]
        return TeacherOutputs(tuple(map(assigned, scores)), tuple(map(as_tokens, bottom_up)))
