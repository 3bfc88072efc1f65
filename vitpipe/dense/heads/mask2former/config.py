"""Settings of Mask2Former's head."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects

TASK = "segment"


class Mask2FormerConfig(HeadConfig):
    """Sizes of Mask2Former (arXiv 2112.01527); `points` are compared per mask in matching and loss."""

    effects: ClassVar[Effects] = Effects(
        weights="name queries width heads feed_forward_width encoder_layers decoder_layers points",
    )

    name: Literal["mask2former"] = "mask2former"
    queries: Count = 100
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    heads: Count = 8
    feed_forward_width: Annotated[int, Field(ge=2)] = 2048
    encoder_layers: Count = 6
    decoder_layers: Count = 9
    points: Count = 12_544


CONFIG = Mask2FormerConfig
