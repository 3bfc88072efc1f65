"""Settings of Cascade Mask R-CNN's heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.section import Effects, Positive
from vitpipe.dense.heads.mask_rcnn.config import RCNNConfig

TASK = "detect"


class CascadeMaskRCNNConfig(RCNNConfig):
    """Cascade R-CNN (arXiv 1712.00726) with three box heads.

    The defaults are ViTDet's: one mask head that learns from the proposals of the first stage, class-agnostic
    boxes, stages of equal weight with the mean of their gradients in the maps. `masks: every_stage` is
    mmdetection's cascade: a mask head per stage, gradients as they are. Swin Transformer's has that, boxes
    `by_class` and `stage_weights` of 1, 0.5 and 0.25.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name masks by_class stage_weights",
    )

    name: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"
    masks: Literal["first_stage", "every_stage"] = "first_stage"
    by_class: bool = False
    stage_weights: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)


CONFIG = CascadeMaskRCNNConfig
