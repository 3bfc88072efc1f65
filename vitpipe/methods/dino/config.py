"""Options of DINO; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.distillation_section import SelfDistillationConfig
from vitpipe.config.section import Effects


class DinoConfig(SelfDistillationConfig):
    """DINO (Caron et al., arXiv 2104.14294), with SelfPatch's crops and without a rising temperature.

    The public model `dino_vits16_300ep_pretrain` has other values: recipe selfpatch/dino_public.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["dino"] = "dino"


CONFIG = DinoConfig
