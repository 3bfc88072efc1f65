"""Settings of the smallest head of segmentation."""

from __future__ import annotations

from typing import Literal

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects

TASK = "segment"


class FcnConfig(HeadConfig):
    """`width` channels between the map of stride 4 and the classes."""

    effects = Effects(weights="name width")
    name: Literal["fcn"] = "fcn"
    width: Count = 16


CONFIG = FcnConfig
