"""LayerNorm over the channels of a feature map, registered with mmcv as norm type `LN2d`."""

from __future__ import annotations

from mmengine.registry import MODELS
from torch import Tensor, nn


# mmcv's own `LN` is torch's, which normalises the last axes, not the channels of (B, C, H, W).
@MODELS.register_module("LN2d")
class LayerNorm2d(nn.LayerNorm):
    """(B, C, H, W) -> (B, C, H, W), each position normalised over C."""

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__(num_features, eps=eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); B may be 0."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
