"""Cascade R-CNN's heads as ViTDet trains them; importing it needs mmdet, see `mm_import.open_detection`.

Cai and Vasconcelos, Cascade R-CNN, arXiv 1712.00726. ViTDet (Li et al., arXiv 2203.16527) uses the cascade of
its own library, which differs from mmdet's: boxes are refined in stages of equal weight whose gradients are
averaged before they reach the maps, and there is one mask head, trained on the proposals of the first stage.
"""

from __future__ import annotations

from typing import Any

from mmdet.models.roi_heads.cascade_roi_head import CascadeRoIHead
from mmdet.models.roi_heads.standard_roi_head import StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from torch import Tensor


@MODELS.register_module()
class OneMaskCascade(CascadeRoIHead):
    """mmdet's cascade with one mask head and averaged gradients of the box stages."""

    init_mask_head = StandardRoIHead.init_mask_head
    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Any]:
        extractor = self.bbox_roi_extractor[stage]
        features = extractor(x[: extractor.num_inputs], rois)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient / self.num_stages)
        scores, deltas = self.bbox_head[stage](features)
        return {"cls_score": scores, "bbox_pred": deltas, "bbox_feats": features}

    def mask_loss(
        self, stage: int, x: tuple[Tensor, ...], sampled: list[Any], truth: list[Any]
    ) -> dict[str, Any]:
        """The mask head's loss in the first stage, nothing in the others."""
        if stage > 0:
            return {"loss_mask": {}}
        found = self._mask_forward(x, bbox2roi([each.pos_priors for each in sampled]))
        loss: dict[str, Any] = self.mask_head.loss_and_target(
            mask_preds=found["mask_preds"],
            sampling_results=sampled,
            batch_gt_instances=truth,
            rcnn_train_cfg=self.train_cfg[0],
        )
        return loss
