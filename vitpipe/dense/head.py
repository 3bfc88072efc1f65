"""The interfaces of heads: what detection and segmentation ask of one, found by its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from vitpipe.config.head import HEADS, HeadConfig
from vitpipe.contracts.discovery import part_of

# Of the five maps that detection heads read: the network's own, or those of an FPN on four of them.
STRIDES = (4, 8, 16, 32, 64)


class Head:
    """Base of all heads. Their modules can be imported without mmdet and mmseg.

    Attributes:
        packages: modules of mmdet or mmseg to import beside those of the task, which register their types.
    """

    packages: ClassVar[tuple[str, ...]] = ()

    def register(self) -> None:
        """Import the modules of this package that register types of the configuration; none by default."""


class DetectionHead(Head, ABC):
    """The heads of a detector with boxes and masks."""

    @abstractmethod
    def parts(self, head: Any, *, widths: Sequence[int], num_classes: int, norm: str) -> dict[str, Any]:
        """All of mmdet's detector configuration but data preprocessor and backbone, its `type` included.

        Args:
            head: the head's own settings.
            widths: channels of the network's maps at strides 4, 8, 16, 32 and, where it has its own pyramid,
                64.
            num_classes: of the dataset.
            norm: `SyncBN` or `BN`, for heads with batch norm.
        """


class SegmentationHead(Head, ABC):
    """The heads of a segmentor.

    Attributes:
        inference: how it is tested unless the recipe says: by a sliding window, or on whole images.
        gives_logits: its scores are logits, and not sums of probabilities; decides how scales are averaged.
        needs_two_images: it has batch norm over a single value per channel and image, which torch refuses for
            a single image.
    """

    inference: ClassVar[Literal["slide", "whole"]]
    gives_logits: ClassVar[bool]
    needs_two_images: ClassVar[bool] = False

    @abstractmethod
    def parts(self, head: Any, *, widths: Sequence[int], num_classes: int, norm: str) -> dict[str, Any]:
        """`decode_head`, and what else of mmseg's segmentor configuration is the head's.

        Args:
            head: the head's own settings.
            widths: channels of the maps at strides 4, 8, 16 and 32.
            num_classes: of the dataset.
            norm: as in `DetectionHead.parts`.
        """


def detection_head(config: HeadConfig) -> DetectionHead:
    """The head that a `detect` section names."""
    found: DetectionHead = part_of(HEADS, config.name, "head", "HEAD", DetectionHead)
    return found


def segmentation_head(config: HeadConfig) -> SegmentationHead:
    """The head that a `segment` section names."""
    found: SegmentationHead = part_of(HEADS, config.name, "head", "HEAD", SegmentationHead)
    return found
