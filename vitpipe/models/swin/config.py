"""Swin Transformers in a recipe: options and the sizes that there are; imports no torch.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows; Ze Liu et al.; arXiv 2103.14030.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationInfo, field_validator, model_validator

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Count, Effects, Positive
from vitpipe.contracts.graph import NetworkKind
from vitpipe.models.swin.shapes import SHAPES, STRIDE, misfit_of_windows

_SWIN = "Swin Transformer (Liu et al., arXiv 2103.14030)"


class SwinConfig(ModelConfig):
    """A Swin Transformer.

    `window` is the tokens per side of a window, the size's own if not given; the windows of every stage must
    divide its grid, but for detection and segmentation, where grids are padded to whole ones. `head_init_std`
    is that of a new classification head's weight. `image_size` is the network's own if not given.
    """

    effects: ClassVar[Effects] = Effects(
        weights="window head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "dense")
    stride: ClassVar[int] = STRIDE

    window: Count | None = None
    # As released; MAE's 2e-5 is a choice of recipes that fine-tune.
    head_init_std: Positive = 0.02

    @property
    def takes_any_size(self) -> bool:
        """No: masks of shifted windows and the windows themselves are made for one size, but for maps."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _takes_its_own_size(cls, values: Any) -> Any:
        # 224, the default of all networks, would be refused with the windows of the smallest one.
        if not isinstance(values, Mapping) or "image_size" in values:
            return values
        own = [entry.image_size for entry in ENTRIES if entry.name == values.get("name")]
        return {**values, "image_size": own[0]} if own else values

    @field_validator("window")
    @classmethod
    def _divides_the_grids(cls, window: int | None, info: ValidationInfo) -> int | None:
        shape, image_size = SHAPES.get(info.data.get("name", "")), info.data.get("image_size")
        # A wrong name or size is reported by itself.
        if shape is None or image_size is None:
            return window
        if (wrong := misfit_of_windows(image_size, window or shape.window)) is not None:
            raise ValueError("; ".join(wrong))
        return window


CONFIG = SwinConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="swin_nano",
        summary="blocks 2-2-2-1, channels 16 to 128, windows of 4: our own, for a laptop and the demo",
        paper="ours, after " + _SWIN,
        published_params=None,
        classifier_params=504_942,
        classifier_macs=6_685_696,
        image_size=64,
        num_layers=9,  # stem, 7 blocks, head
    ),
    ModelEntry(
        name="swin_tiny",
        summary="blocks 2-2-6-2, channels 96 to 768, windows of 7",
        paper=_SWIN,
        # Table 1 says 29, the table of the released code 28; counted are 28.29.
        published_params=None,
        classifier_params=28_288_354,
        classifier_macs=4_490_566_656,
        image_size=224,
        num_layers=14,
    ),
    ModelEntry(
        name="swin_small",
        summary="blocks 2-2-18-2, channels 96 to 768, windows of 7",
        paper=_SWIN,
        published_params=50.0,  # table 1
        classifier_params=49_606_258,
        classifier_macs=8_740_875_264,
        image_size=224,
        num_layers=26,
    ),
    ModelEntry(
        name="swin_base",
        summary="blocks 2-2-18-2, channels 128 to 1024, windows of 7",
        paper=_SWIN,
        published_params=88.0,
        classifier_params=87_768_224,
        classifier_macs=15_430_946_816,
        image_size=224,
        num_layers=26,
    ),
)
