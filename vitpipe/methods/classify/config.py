"""Options of supervised classification."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.method import MethodConfig
from vitpipe.config.section import Effects, Ratio
from vitpipe.contracts.graph import NetworkKind


class MixedTargetsConfig(MethodConfig):
    """What all methods have that train a classifier on mixed images; how stands in the stage's `augment`."""

    effects: ClassVar[Effects] = Effects(
        weights="label_smoothing",
    )

    gives_classifier: ClassVar[bool] = True
    builds: ClassVar[tuple[NetworkKind, ...]] = ("classifier",)
    label_smoothing: Ratio = 0.1


class SoftTargetsConfig(MixedTargetsConfig):
    """Supervised classification; how images are mixed stands in the stage's `augment`."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: Literal["classify"] = "classify"


CONFIG = SoftTargetsConfig
