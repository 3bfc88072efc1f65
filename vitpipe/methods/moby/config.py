"""Options of MoBY; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.contrast_section import ContrastConfig
from vitpipe.config.section import Effects


class MobyConfig(ContrastConfig):
    """MoBY (Xie et al., arXiv 2105.04553)."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["moby"] = "moby"


CONFIG = MobyConfig
