"""Settings of Mask R-CNN's heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects, Positive

TASK = "detect"


class RCNNConfig(HeadConfig):
    """What Mask R-CNN and its cascade share.

    The defaults are iTPN's (section 9). ViTDet's (arXiv 2203.16527) are two convolutions before the
    proposals, layer norm in box and mask head, and L1 on box deltas. Batch norm is in the box head only.
    """

    effects: ClassVar[Effects] = Effects(
        weights="width fc_width anchor_scale proposals rpn_convs norm box_loss",
    )

    width: Count = 256
    fc_width: Count = 1024
    anchor_scale: Positive = 8.0
    proposals: Count = 1000
    rpn_convs: Count = 1
    norm: Literal["batch", "layer"] = "batch"
    box_loss: Literal["giou", "l1"] = "giou"


class MaskRCNNConfig(RCNNConfig):
    """Mask R-CNN (arXiv 1703.06870)."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["mask_rcnn"] = "mask_rcnn"


CONFIG = MaskRCNNConfig
