"""The transformer pyramid: a neck without convolutions that is pre-trained together with the backbone.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian, Lingxi Xie, Zhaozhi Wang, Longhui Wei,
Xiaopeng Zhang, Jianbin Jiao, Yaowei Wang, Qi Tian, Qixiang Ye; arXiv 2211.12735, section 3 and figure 2;
supplement, section 2 (why nothing in it mixes positions).

    x16 --project16------------------------> refine16 > o16
     \\--split16to8 -- + lateral8(f8) > fuse8 > refine8 > o8
                          \\--split8to4 -- + lateral4(f4) > fuse4 > refine4 > o4

Shapes: B images, N units (row-major), h sub-tokens per side of a unit, C channels, D pyramid width.
Parameter names: as in the picture, `split*.{norm,linear}`, `fuse*.I.{norm,mlp}`, `refine*.{norm,mlp}`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpipe.models.blocks import ChannelBlock, init_weights
from vitpipe.models.hivit.config import DECAY_STATED_FOR
from vitpipe.models.hivit.hivit import HiViT, StageFeatures, dense_layer_index
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.network import DenseBackbone, Task

_MLP_RATIO = 4  # of the pyramid's blocks (hidden 1024 at width 256), unlike 3 in the stages below it


class PyramidLevels(NamedTuple):
    """Finest first, in unit layout: (B, N, 4, 4, D), (B, N, 2, 2, D), (B, N, 1, 1, D)."""

    o4: Tensor
    o8: Tensor
    o16: Tensor


class PyramidFeatures(NamedTuple):
    """Maps (B, C, H, W) at strides 4, 8, 16: of the pyramid (o), and of the stages below it (f4, f8, x16)."""

    o4: Tensor
    o8: Tensor
    o16: Tensor
    f4: Tensor
    f8: Tensor
    x16: Tensor


def to_map(x_BNhhC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put unit layout back into the image plane: (B, N, h, h, C) -> (B, C, rows*h, columns*h).

    Args:
        grid: rows and columns of units, N = rows * columns.
    """
    num_images, _, side, _, width = x_BNhhC.shape
    rows, columns = grid
    units = x_BNhhC.view(num_images, rows, columns, side, side, width)
    return units.permute(0, 5, 1, 3, 2, 4).reshape(num_images, width, rows * side, columns * side)


class Split(nn.Module):
    """Open each token into its 2 x 2 children: (B, N, h, h, C) -> (B, N, 2h, 2h, D)."""

    def __init__(self, width: int, out_width: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        # The inverse of `Merge`: LayerNorm first, no bias, as in the released code.
        self.linear = nn.Linear(width, 4 * out_width, bias=False)

    def forward(self, x_BNhhC: Tensor) -> Tensor:
        """(B, N, h, h, C) -> (B, N, 2h, 2h, D)."""
        num_images, num_units, side = x_BNhhC.shape[:3]
        # The 4 * D outputs are read as (row, column, D). Unlike in `Merge` the column runs fastest: that is
        # the order of the released weights.
        children = self.linear(self.norm(x_BNhhC)).view(num_images, num_units, side, side, 2, 2, -1)
        interleaved = children.permute(0, 1, 2, 4, 3, 5, 6)
        return interleaved.reshape(num_images, num_units, 2 * side, 2 * side, -1)


class Pyramid(nn.Module):
    """The neck.

    Args:
        widths: channels of the stages at strides 4, 8, 16.
        width: D, channels of every pyramid level.
        depth: channel blocks after each fusion; published: 2 in pixel pre-training.
        norm_eps: of every LayerNorm.
        init_gain: see `init_weights`.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        width: int,
        depth: int,
        norm_eps: float = 1e-6,
        init_gain: float | None = None,
    ) -> None:
        super().__init__()
        width4, width8, width16 = widths

        def block() -> ChannelBlock:
            return ChannelBlock(width, _MLP_RATIO, norm_eps=norm_eps)

        # Only channel blocks and Linear layers: none mixes positions, so hidden units cannot leak into
        # visible ones (supplement, section 2).
        self.width, self.depth = width, depth
        # The released code has no such layer where the widths agree already.
        self.project16 = nn.Identity() if width16 == width else nn.Linear(width16, width)
        self.split16to8 = Split(width16, width, norm_eps=norm_eps)
        self.lateral8 = nn.Linear(width8, width, bias=False)
        self.fuse8 = nn.Sequential(*(block() for _ in range(depth)))
        self.split8to4 = Split(width, width, norm_eps=norm_eps)
        self.lateral4 = nn.Linear(width4, width, bias=False)
        self.fuse4 = nn.Sequential(*(block() for _ in range(depth)))
        self.refine16, self.refine8, self.refine4 = block(), block(), block()
        init_weights(self, init_gain)

    def forward(self, stages: StageFeatures, lateral_BN: Tensor | None = None) -> PyramidLevels:
        """Stage outputs of N units (all, or the kept ones) -> pyramid levels of the same units.

        Args:
            lateral_BN: factor on what a unit gets from strides 4 and 8; 1 without it.
        """
        x16_BN11C = stages.level16_BNC[:, :, None, None, :]
        # The way down starts from x16 itself, not from its projection, and goes on from p8 before its
        # refinement: `refine*` serves the outputs alone.
        lateral8 = self.lateral8(stages.level8_BNhhC)
        lateral4 = self.lateral4(stages.level4_BNhhC)
        if lateral_BN is not None:
            factor_BN111 = lateral_BN[:, :, None, None, None].to(lateral8.dtype)
            lateral8, lateral4 = lateral8 * factor_BN111, lateral4 * factor_BN111
        p8 = self.fuse8(self.split16to8(x16_BN11C) + lateral8)
        p4 = self.fuse4(self.split8to4(p8) + lateral4)
        return PyramidLevels(self.refine4(p4), self.refine8(p8), self.refine16(self.project16(x16_BN11C)))


def map_features(pyramid: Pyramid, stages: StageFeatures, grid: tuple[int, int]) -> PyramidFeatures:
    """Stage outputs of all units, and what the pyramid makes of them, as maps.

    Args:
        grid: rows and columns of units.
    """
    units = (
        *pyramid(stages),
        stages.level4_BNhhC,
        stages.level8_BNhhC,
        stages.level16_BNC[:, :, None, None, :],
    )
    return PyramidFeatures(*(to_map(x_BNhhC, grid) for x_BNhhC in units))


def task_maps(maps: PyramidFeatures, task: Task) -> tuple[Tensor, ...]:
    """The maps (B, C, H/s, W/s) that the heads of a task read, finest first; see `PyramidBackbone`."""
    # Strides 32 and 64 come from pooled maps, after the conversion from units: averages in the released
    # detector, maxima in the released segmentor.
    if task == "detect":
        o32 = F.avg_pool2d(maps.o16, kernel_size=2)
        return maps.o4, maps.o8, maps.o16, o32, F.avg_pool2d(o32, kernel_size=2)
    # The segmentor's heads read pyramid and stage side by side: for base 256 + 128, 256 + 256, 256 + 512.
    joined16 = torch.cat([maps.o16, maps.x16], dim=1)
    return (
        torch.cat([maps.o4, maps.f4], dim=1),
        torch.cat([maps.o8, maps.f8], dim=1),
        joined16,
        F.max_pool2d(joined16, kernel_size=2),
    )


def task_widths(pyramid_width: int, stage_widths: tuple[int, ...], task: Task) -> tuple[int, ...]:
    """Channels of each of the maps of `task_maps`."""
    if task == "detect":
        return (pyramid_width,) * 5
    joined = [pyramid_width + width for width in stage_widths]
    return (*joined, joined[-1])


class PyramidBackbone(DenseBackbone):
    """Backbone and pyramid as dense features, the same modules and names as in pre-training.

    There is no FPN: the neck that the heads see is the pyramid that was trained together with the backbone.
    The pooling beyond stride 16, what segmentation concatenates, and which parameters decay are from the
    authors' released code.

    detect: o4, o8, o16, and o16 averaged over 2 x 2 once and twice: strides 4 to 64, all of the pyramid's
    width. segment: pyramid level and stage output of each stride side by side, and those of stride 16
    max-pooled over 2 x 2: strides 4 to 32.
    """

    family = "hivit"

    def __init__(self, backbone: HiViT, pyramid: Pyramid, task: Task) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.task = backbone, pyramid, task
        # In segmentation the released code decays the position table: its name test never matches. Relative
        # tables decay here, unlike in classification.
        self.no_decay = ("absolute_position",) if task == "detect" else ()

    def features(self, images_BCHW: Tensor) -> PyramidFeatures:
        """(B, 3, H, W), H and W multiples of 16 -> maps at strides 4, 8, 16."""
        grid = (images_BCHW.shape[-2] // UNIT_PIXELS, images_BCHW.shape[-1] // UNIT_PIXELS)
        return map_features(self.pyramid, self.backbone.forward_stages(images_BCHW), grid)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s) of the task, finest first."""
        return task_maps(self.features(images_BCHW), self.task)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return task_widths(self.pyramid.width, self.backbone.widths, self.task)

    @property
    def num_layers(self) -> int:
        """T + 1 layer ids 0 ... T, T = blocks + 2, merges counted; see `dense_layer_index`."""
        return self.backbone.num_blocks + 3

    @property
    def head_layer(self) -> int:
        """T - 1: pyramid and heads have the base learning rate."""
        return self.num_layers - 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `dense_layer_index`."""
        return dense_layer_index(name, self.backbone.shape.depths, self.task)

    def layer_scales(self, decay: float) -> tuple[float, ...]:
        """Factor per layer id, `f^(T - 1 - id)`; f = d in detection, d^(13/T) in segmentation."""
        # Not the rule of the base class: 1 belongs to id T - 1 (pyramid and heads), and the exponent 13/T is
        # taken in segmentation only. Both are the released configurations'.
        last = self.num_layers - 1
        factor = decay if self.task == "detect" else decay ** (DECAY_STATED_FOR / last)
        return tuple(float(factor ** (last - 1 - layer)) for layer in range(self.num_layers))
