"""Options of classification with intermediate supervision."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.section import Effects, NotNegative
from vitpipe.contracts.graph import NetworkKind
from vitpipe.methods.classify.config import MixedTargetsConfig


class IntermediateSupervisionConfig(MixedTargetsConfig):
    """`pixel_weight` scales the reconstruction losses, `class_weight` those of the auxiliary classifiers.

    The defaults are those of RevCol's released training (arXiv 2212.11696); how they are spread over the
    depths: `method.head_weights`.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name pixel_weight class_weight",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("classifier", "intermediate_heads")

    name: Literal["intermediate_supervision"] = "intermediate_supervision"
    pixel_weight: NotNegative = 3.0
    class_weight: NotNegative = 0.7


CONFIG = IntermediateSupervisionConfig
