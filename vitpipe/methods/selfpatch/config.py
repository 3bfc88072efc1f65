"""Options of SelfPatch on DINO; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.distillation_section import PatchLossConfig
from vitpipe.config.section import Effects


class SelfPatchConfig(PatchLossConfig):
    """DINO + SelfPatch (Yun et al., CVPR 2022). Best with a network whose pooling is `class_attention`."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["selfpatch"] = "selfpatch"


CONFIG = SelfPatchConfig
