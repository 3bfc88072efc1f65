"""Mask R-CNN's heads (He et al., arXiv 1703.06870), on a pyramid of the network or behind an FPN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import DetectionHead
from vitpipe.dense.heads.mask_rcnn.config import MaskRCNNConfig
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

_BOX_IOU = 0.5


class MaskRCNN(DetectionHead):
    """One box head and one mask head."""

    def register(self) -> None:
        """Register LayerNorm over channels."""
        import vitpipe.dense.layer_norm  # noqa: F401

    def parts(
        self, head: MaskRCNNConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """mmdet's `MaskRCNN`; boxes by class."""
        width = maps_width(head, widths)
        return {
            "type": "MaskRCNN",
            **neck(head, widths),
            "rpn_head": rpn_head(head, width),
            "roi_head": {
                "type": "StandardRoIHead",
                "bbox_head": box_head(head, width, num_classes, norm, BOX_STDS, by_class=True),
                "bbox_roi_extractor": roi_extractor(width, 7),
                "mask_roi_extractor": roi_extractor(width, 14),
                "mask_head": mask_head(head, width, num_classes),
            },
            "train_cfg": {
                **proposal_training(head),
                "rcnn": box_training(_BOX_IOU, match_low_quality=True),
            },
            "test_cfg": test_rules(head),
        }


HEAD = MaskRCNN()
