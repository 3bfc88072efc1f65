"""Cascade R-CNN's heads as in ViTDet; call `mm_import.open_detection` before the import.

Cai and Vasconcelos, Cascade R-CNN, arXiv 1712.00726. ViTDet (Li et al., arXiv 2203.16527) uses Detectron2's
cascade, which differs from mmdet's: the stages have equal weights, their gradients are averaged before they
reach the feature maps, and there is one mask head, trained on the proposals of the first stage.
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
    """mmdet's cascade with one mask head and the mean of the box stages' gradients."""

    # mmdet 3.5.1 builds a mask head for every stage; the single-stage head's methods build and use one.
    init_mask_head = StandardRoIHead.init_mask_head
    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Any]:
        extractor = self.bbox_roi_extractor[stage]
        features = extractor(x[: extractor.num_inputs], rois)
        # Detectron2 scales the gradient of the pooled features, not the loss: the heads' own gradients stay.
        # Features of a frozen or evaluated network take no hook (torch raises RuntimeError).
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient / self.num_stages)
        scores, deltas = self.bbox_head[stage](features)
        return {"cls_score": scores, "bbox_pred": deltas, "bbox_feats": features}

    def mask_loss(
        self, stage: int, x: tuple[Tensor, ...], sampled: list[Any], truth: list[Any]
    ) -> dict[str, Any]:
        """Loss of the mask head in the first stage; an empty loss in the others."""
        if stage > 0:
            # mmdet iterates over `loss_mask` of every stage: the key must be there.
            return {"loss_mask": {}}
        found = self._mask_forward(x, bbox2roi([each.pos_priors for each in sampled]))
        loss: dict[str, Any] = self.mask_head.loss_and_target(
            mask_preds=found["mask_preds"],
            sampling_results=sampled,
            batch_gt_instances=truth,
            # mmdet keeps one training configuration per stage; the only mask head uses the first.
            rcnn_train_cfg=self.train_cfg[0],
        )
        return loss
