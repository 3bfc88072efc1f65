"""Settings of UPerNet's heads."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects

TASK = "segment"


class UPerNetConfig(HeadConfig):
    """UPerNet (arXiv 1807.10221) with an auxiliary head.

    `neck: multi_level` resizes four maps of one size to strides of a quarter to twice theirs
    (mmsegmentation's `MultiLevelNeck`), for plain vision transformers. `auxiliary_map` is the map that the
    auxiliary head reads: 2 (iTPN's) or 3 (mmsegmentation's DeiT).
    """

    effects: ClassVar[Effects] = Effects(
        weights="name neck width auxiliary_width auxiliary_map",
    )

    name: Literal["upernet"] = "upernet"
    neck: Literal["none", "multi_level"] = "none"
    width: Count = 768
    auxiliary_width: Count = 256
    auxiliary_map: Annotated[int, Field(ge=0, le=3)] = 2


CONFIG = UPerNetConfig
