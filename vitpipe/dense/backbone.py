"""Adapter from this package's networks to the backbone interface of mmdet and mmseg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitpipe.config.dense_sections import DenseConfig
from vitpipe.config.model import ModelConfig, model_config
from vitpipe.models.build import build_dense
from vitpipe.models.network import Task

# Prefix of the network's parameter names inside a detector or segmentor.
NET_PREFIX = "backbone.net."


# In mmengine's registry, the parent of both mmdet's and mmseg's: either finds the type there.
@MODELS.register_module()
class DenseMaps(nn.Module):
    """Any family's `DenseBackbone` as a backbone that returns a tuple of feature maps, finest first.

    Args:
        model: a recipe's `model` section as plain values.
        image_size: pixels per side for which position tables of a fixed size are built.
        drop_path: stochastic depth rate of the last block.
    """

    def __init__(self, task: Task, model: Mapping[str, Any], image_size: int, drop_path: float) -> None:
        super().__init__()
        # mmengine's configurations hold plain values only: the recipe's section comes as a mapping.
        self.net = build_dense(model_config(model), task, image_size=image_size, drop_path=drop_path)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> feature maps (B, C, H/s, W/s), one per stride s."""
        maps: tuple[Tensor, ...] = self.net(images_BCHW)
        return maps


def maps_config(dense: DenseConfig, model: ModelConfig, task: Task, image_size: int) -> dict[str, Any]:
    """The `backbone` entry of a detector's or segmentor's configuration."""
    return {
        "type": "DenseMaps",
        "task": task,
        "model": model.model_dump(mode="json"),
        "image_size": image_size,
        "drop_path": dense.drop_path,
    }


def map_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Number of channels of each feature map of a `maps_config`."""
    # The heads' configuration needs the widths before the network is built: the meta device takes no memory.
    with torch.device("meta"):
        net = DenseMaps(**{key: value for key, value in config.items() if key != "type"}).net
    return net.widths
