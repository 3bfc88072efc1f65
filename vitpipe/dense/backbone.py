"""Our networks in the form that mmdet's and mmseg's heads read: a tuple of maps, finest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitpipe.config.recipe import DenseConfig, ModelConfig
from vitpipe.models.build import build_dense
from vitpipe.models.network import Task

# Where the parameters of the network stand inside a detector or segmentor.
NET_PREFIX = "backbone.net."


@MODELS.register_module()
class DenseMaps(nn.Module):
    """Any family's `DenseBackbone`, which says itself what its maps are.

    Args:
        model: a recipe's `model` section as plain values, since mmengine's configurations hold nothing else.
        image_size: pixels per side that position tables of a fixed size are made for.
        drop_path: drop ratio of the last block.
        pyramid_depth: see `Family.dense`.
    """

    def __init__(
        self,
        task: Task,
        model: Mapping[str, Any],
        image_size: int,
        drop_path: float,
        pyramid_depth: int | None,
    ) -> None:
        super().__init__()
        self.net = build_dense(
            ModelConfig(**model),
            task,
            image_size=image_size,
            drop_path=drop_path,
            pyramid_depth=pyramid_depth,
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s)."""
        maps: tuple[Tensor, ...] = self.net(images_BCHW)
        return maps


def maps_config(dense: DenseConfig, model: ModelConfig, task: Task, image_size: int) -> dict[str, Any]:
    """The backbone's part of a detector's or segmentor's configuration."""
    return {
        "type": "DenseMaps",
        "task": task,
        "model": model.model_dump(mode="json"),
        "image_size": image_size,
        "drop_path": dense.drop_path,
        "pyramid_depth": dense.pyramid_depth,
    }


def map_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels of each map of a `maps_config`, read off a network without numbers."""
    with torch.device("meta"):
        net = DenseMaps(**{key: value for key, value in config.items() if key != "type"}).net
    return net.widths
