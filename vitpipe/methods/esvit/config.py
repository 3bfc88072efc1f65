"""Options of EsViT; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.distillation_section import SelfDistillationConfig
from vitpipe.config.section import Effects, Ratio


class EsvitConfig(SelfDistillationConfig):
    """EsViT (Li et al., arXiv 2106.09785): `region_weight` is the share of the region loss.

    Both heads have `prototypes` outputs, as in the released code.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name region_weight",
    )

    name: Literal["esvit"] = "esvit"
    region_weight: Ratio = 0.5


CONFIG = EsvitConfig
