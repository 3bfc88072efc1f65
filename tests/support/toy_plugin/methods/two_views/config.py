"""Options of a toy method with a teacher and several views."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.method import MethodConfig
from vitpipe.config.multi_crop import CropsConfig
from vitpipe.config.section import Effects, Positive, Ratio
from vitpipe.contracts.graph import NetworkKind


class TwoViewsConfig(MethodConfig):
    """Two global views and local ones, a moving-average teacher, a centre."""

    effects: ClassVar[Effects] = Effects(
        weights="name crops base_momentum clip_each frozen_epochs",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder",)

    name: Literal["two_views"] = "two_views"
    crops: CropsConfig = CropsConfig()
    base_momentum: Ratio = 0.9
    clip_each: Positive = 0.05
    frozen_epochs: int = 1


CONFIG = TwoViewsConfig
