"""Settings of Mask R-CNN's heads."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.head import HeadConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, Positive

TASK = "detect"
# Strides 4, 8, 16, 32 and 64.
NUM_MAPS = 5


class RCNNConfig(HeadConfig):
    """What Mask R-CNN and its cascade share.

    The defaults are iTPN's (section 9). ViTDet's (arXiv 2203.16527) are two convolutions before the
    proposals, layer norm in box and mask head, and L1 on box deltas. Batch norm is in the convolutions of the
    box head only. Mask R-CNN's own (mmdetection's standard, which SelfPatch's detector takes) are an FPN, two
    linear layers without convolutions in the box head, and L1. `neck: fpn` (arXiv 1612.03144) makes the five
    maps that the heads read from four of a network without a pyramid of its own.

    Proposals learn by `rpn_loss`, with `inner_anchors` from anchors inside of the image only; a box head is
    trained on `train_proposals` of them, as many as in tests if not given. mmdetection's cascade has smooth
    L1, inner anchors and 2,000.
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "neck width fc_width box_convs box_linears anchor_scale proposals train_proposals rpn_convs "
            "rpn_loss inner_anchors norm box_loss"
        ),
    )

    neck: Literal["none", "fpn"] = "none"
    width: Count = 256
    fc_width: Count = 1024
    box_convs: Annotated[int, Field(ge=0)] = 4
    box_linears: Count = 1
    anchor_scale: Positive = 8.0
    proposals: Count = 1000
    train_proposals: Count | None = None
    rpn_convs: Count = 1
    rpn_loss: Literal["l1", "smooth_l1"] = "l1"
    inner_anchors: bool = False
    norm: Literal["batch", "layer"] = "batch"
    box_loss: Literal["giou", "l1"] = "giou"

    def misfit(self, model: ModelConfig) -> str:
        """An FPN on a pyramid that is one, or none where one is needed."""
        if self.neck == "none" and model.num_detection_maps < NUM_MAPS:
            return (
                f"head.neck is none, but '{model.name}' has {model.num_detection_maps} feature maps for "
                f"detection, and the head reads {NUM_MAPS}: set it to fpn"
            )
        if self.neck == "fpn" and model.num_detection_maps == NUM_MAPS:
            return f"head.neck is fpn, but '{model.name}' has a feature pyramid of its own: set it to none"
        return ""


class MaskRCNNConfig(RCNNConfig):
    """Mask R-CNN (arXiv 1703.06870)."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["mask_rcnn"] = "mask_rcnn"


CONFIG = MaskRCNNConfig
