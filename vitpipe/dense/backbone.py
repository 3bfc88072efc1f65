"""Our backbone and pyramid in the form that mmdet's and mmseg's heads read: a tuple of maps, finest first.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735. There is no FPN:
the neck that the heads see is the pyramid that was trained together with the backbone. How the maps
below stride 16 are made, and what segmentation concatenates, is from the authors' released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitpipe.config.recipe import ModelConfig
from vitpipe.models.build import build_pyramid_backbone

Task = Literal["detect", "segment"]


@MODELS.register_module()
class PyramidMaps(nn.Module):
    """Backbone and pyramid, with the maps of one task.

    detect: o4, o8, o16 of the pyramid, and o16 averaged over 2 x 2 once and twice: strides 4 to 64, all of
    the pyramid's width. No relative positions; any H and W that are multiples of 16.
    segment: pyramid level and stage output of each stride, concatenated in this order, and those of stride
    16 max-pooled over 2 x 2: strides 4 to 32. Relative positions, so H = W = `image_size`.

    Args:
        model: a recipe's `model` section as plain values, since mmengine's configurations hold nothing else.
        image_size: pixels per side that the position tables are made for.
        drop_path: drop ratio of the last block.
        pyramid_depth: channel blocks after each fusion.
    """

    def __init__(
        self,
        task: Task,
        model: Mapping[str, Any],
        image_size: int,
        drop_path: float,
        pyramid_depth: int,
    ) -> None:
        super().__init__()
        self.task = task
        self.net = build_pyramid_backbone(
            ModelConfig(**model),
            image_size=image_size,
            drop_path=drop_path,
            pyramid_depth=pyramid_depth,
            relative_position=task == "segment",
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s)."""
        maps = self.net(images_BCHW)
        if self.task == "detect":
            o32 = F.avg_pool2d(maps.o16, kernel_size=2)
            return maps.o4, maps.o8, maps.o16, o32, F.avg_pool2d(o32, kernel_size=2)
        joined16 = torch.cat([maps.o16, maps.x16], dim=1)
        return (
            torch.cat([maps.o4, maps.f4], dim=1),
            torch.cat([maps.o8, maps.f8], dim=1),
            joined16,
            F.max_pool2d(joined16, kernel_size=2),
        )
