"""Mask2Former's head in full precision; it needs mmseg and mmdet, see `mm_import.open_segmentation`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead
from mmseg.registry import MODELS
from torch import Tensor

_FINEST_STRIDE = 4
# mmdet's point generator asks in the old way, at every start.
warnings.filterwarnings("ignore", message=r"torch\.meshgrid")


@MODELS.register_module()
class FullPrecisionMask2Former(Mask2FormerHead):
    """mmseg's head outside autocast.

    Deformable attention has no bfloat16 kernel, and matching in half precision ties queries that differ.
    """

    def loss(self, x: tuple[Tensor, ...], *given: Any) -> dict[str, Tensor]:
        """As mmseg's, of maps in any precision."""
        with torch.autocast(x[0].device.type, enabled=False):
            losses: dict[str, Tensor] = super().loss(_full(x), *given)
        return losses

    def predict(self, x: tuple[Tensor, ...], metas: list[dict[str, Any]], rules: Any) -> Tensor:
        """As mmseg's, of maps in any precision: scores (B, K, H, W)."""
        # The picture's size is not that of a sliding window.
        size = tuple(_FINEST_STRIDE * side for side in x[0].shape[-2:])
        with torch.autocast(x[0].device.type, enabled=False):
            scores: Tensor = super().predict(_full(x), [{**meta, "pad_shape": size} for meta in metas], rules)
        return scores


def _full(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x_BCHW.float() for x_BCHW in maps)
