"""The key `head` of detection and segmentation: which head, with its own settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import SerializeAsAny

from vitpipe.config.model import ModelConfig
from vitpipe.config.named import NamedSection, one_of

HEADS = "vitpipe.dense.heads"


class HeadConfig(NamedSection):
    """Base of the settings of a head (`vitpipe/dense/heads/NAME/config.py`)."""

    def misfit(self, model: ModelConfig) -> str:
        """Why the head cannot read the maps of this network; empty when it can."""
        return ""


# By the value's own class: as a `HeadConfig` a recipe would be written without the settings.
AnyHead = SerializeAsAny[HeadConfig]
DetectionHead = Annotated[AnyHead, one_of(HEADS, "detection head", "mask_rcnn", TASK="detect")]
SegmentationHead = Annotated[AnyHead, one_of(HEADS, "segmentation head", "upernet", TASK="segment")]
