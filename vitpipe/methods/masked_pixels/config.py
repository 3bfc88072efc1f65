"""Options of masked image modelling on pixels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.method import MethodConfig
from vitpipe.config.section import Effects
from vitpipe.config.train_sections import MIXING
from vitpipe.contracts.graph import NetworkKind


class MaskedPixelsConfig(MethodConfig):
    """Masked image modelling on pixels (iTPN, section 4).

    `target_norm` says by what the target is normalised: each unit by its own mean and deviation (MAE), or all
    of an image by the image's. `loss_on` says which units count: the masked ones (MAE), or all.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name mask_ratio target_norm loss_on",
    )

    ignored_augment: ClassVar[tuple[str, ...]] = MIXING
    builds: ClassVar[tuple[NetworkKind, ...]] = ("pretrainer",)

    name: Literal["masked_pixels"] = "masked_pixels"
    # As in MAE; iTPN and RevColV2 keep it.
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    # The second value of each is for short runs (docs/pretraining-at-demo-size.md), and in no paper here.
    target_norm: Literal["unit", "image"] = "unit"
    loss_on: Literal["masked", "all"] = "masked"


CONFIG = MaskedPixelsConfig
