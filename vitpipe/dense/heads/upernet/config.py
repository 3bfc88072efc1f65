"""Settings of UPerNet's heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects

TASK = "segment"


class UPerNetConfig(HeadConfig):
    """UPerNet (arXiv 1807.10221) with an auxiliary head on the map of stride 16."""

    effects: ClassVar[Effects] = Effects(
        weights="name width auxiliary_width",
    )

    name: Literal["upernet"] = "upernet"
    width: Count = 768
    auxiliary_width: Count = 256


CONFIG = UPerNetConfig
