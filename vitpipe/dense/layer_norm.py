"""LayerNorm over the channels of a map, as mmcv's norm type `LN2d`; mmcv's own `LN` wants channels last."""

from __future__ import annotations

from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module("LN2d")
class LayerNorm2d(nn.LayerNorm):
    """(B, C, H, W) -> (B, C, H, W), each place normalised over C."""

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__(num_features, eps=eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); B may be 0."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
