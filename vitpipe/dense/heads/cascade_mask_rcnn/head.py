"""Cascade Mask R-CNN's heads as in ViTDet (arXiv 2203.16527; `one_mask_cascade`) or as in mmdetection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import DetectionHead
from vitpipe.dense.heads.cascade_mask_rcnn.config import CascadeMaskRCNNConfig
from vitpipe.dense.rcnn_parts import (
    BOX_STDS,
    box_head,
    box_training,
    maps_width,
    mask_head,
    neck,
    proposal_training,
    roi_extractor,
    rpn_head,
    test_rules,
)

# The inverse of Detectron2's weights (10, 5), (20, 10), (30, 15) for positions and sizes.
_STAGE_STDS = tuple(tuple(std / number for std in BOX_STDS) for number in (1, 2, 3))
# As in the Cascade R-CNN paper.
_STAGE_IOUS = (0.5, 0.6, 0.7)


class CascadeMaskRCNN(DetectionHead):
    """Three box heads, each refining the boxes of the one before, and one mask head or three."""

    def register(self) -> None:
        """Register the cascade with one mask head, and LayerNorm over channels."""
        import vitpipe.dense.heads.cascade_mask_rcnn.one_mask_cascade
        import vitpipe.dense.layer_norm  # noqa: F401

    def parts(
        self, head: CascadeMaskRCNNConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """mmdet's `CascadeRCNN`, with `OneMaskCascade` or its own heads."""
        width = maps_width(head, widths)
        one_mask = head.masks == "first_stage"
        return {
            "type": "CascadeRCNN",
            **neck(head, widths),
            "rpn_head": rpn_head(head, width),
            "roi_head": {
                # mmdet's own makes a mask head for every stage of the one configuration.
                "type": "OneMaskCascade" if one_mask else "CascadeRoIHead",
                "num_stages": len(_STAGE_STDS),
                "stage_loss_weights": list(head.stage_weights),
                "bbox_head": [
                    box_head(head, width, num_classes, norm, stds, by_class=head.by_class)
                    for stds in _STAGE_STDS
                ],
                "bbox_roi_extractor": roi_extractor(width, 7),
                "mask_roi_extractor": roi_extractor(width, 14),
                "mask_head": mask_head(head, width, num_classes),
            },
            "train_cfg": {
                **proposal_training(head),
                "rcnn": [box_training(iou, match_low_quality=False) for iou in _STAGE_IOUS],
            },
            "test_cfg": test_rules(head),
        }


HEAD = CascadeMaskRCNN()
