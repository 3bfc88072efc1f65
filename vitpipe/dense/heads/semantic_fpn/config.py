"""Settings of Semantic FPN's head."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects

TASK = "segment"


class SemanticFPNConfig(HeadConfig):
    """Semantic FPN (arXiv 1901.02446): an FPN of `neck_width` channels, and convolutions of `width`."""

    effects: ClassVar[Effects] = Effects(
        weights="name width neck_width",
    )

    name: Literal["semantic_fpn"] = "semantic_fpn"
    width: Count = 128
    neck_width: Count = 256


CONFIG = SemanticFPNConfig
