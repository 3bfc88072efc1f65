"""Settings of Cascade Mask R-CNN's heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.section import Effects
from vitpipe.dense.heads.mask_rcnn.config import RCNNConfig

TASK = "detect"


class CascadeMaskRCNNConfig(RCNNConfig):
    """Cascade R-CNN (arXiv 1712.00726) with one mask head, as in ViTDet."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"


CONFIG = CascadeMaskRCNNConfig
