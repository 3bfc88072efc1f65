"""Mask2Former's head in float32; call `mm_import.open_segmentation('mask2former')` before the import."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead
from mmseg.registry import MODELS
from torch import Tensor

_FINEST_STRIDE = 4
# mmdet 3.5.1's point generator calls torch.meshgrid without `indexing`, of which torch warns at every start.
warnings.filterwarnings("ignore", message=r"torch\.meshgrid")


@MODELS.register_module()
class FullPrecisionMask2Former(Mask2FormerHead):
    """mmseg's head outside of autocast.

    Deformable attention has no bfloat16 kernel, and in half precision the matching costs of different queries
    become equal.
    """

    def loss(self, x: tuple[Tensor, ...], *given: Any) -> dict[str, Tensor]:
        """As mmseg's `loss`, for feature maps of any precision."""
        with torch.autocast(x[0].device.type, enabled=False):
            losses: dict[str, Tensor] = super().loss(_full(x), *given)
        return losses

    def predict(self, x: tuple[Tensor, ...], metas: list[dict[str, Any]], rules: Any) -> Tensor:
        """As mmseg's `predict`, for feature maps of any precision: scores (B, K, H, W)."""
        # mmseg 1.4.2 resizes masks to `pad_shape`, the size of the whole image, also for a sliding window,
        # which is smaller: the size is taken from the finest map.
        size = tuple(_FINEST_STRIDE * side for side in x[0].shape[-2:])
        with torch.autocast(x[0].device.type, enabled=False):
            scores: Tensor = super().predict(_full(x), [{**meta, "pad_shape": size} for meta in metas], rules)
        return scores


def _full(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x_BCHW.float() for x_BCHW in maps)
