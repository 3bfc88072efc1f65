"""Cost of a recipe's detector or segmentor: the same counts as of a classifier, on torch's meta device.

    recipe > network of stage detect or segment > one image > parameters, multiply-adds

What a detector costs depends on how many boxes reach its heads; papers count 1,000 boxes in the box head and
100 in the mask head (mmdetection's `get_flops`), whatever the image shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitpipe.benchmarks.model_cost import Cost, measure_cost
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.dense.head import segmentation_head
from vitpipe.dense.mm_import import open_detection, open_segmentation

BOXES, MASKS = 1000, 100
DenseStage = Literal["detect", "segment"]
DENSE_CONVENTIONS = {
    "detect": f"backbone, neck, RPN head, box head on {BOXES:,} boxes, mask head on {MASKS} boxes; no "
    "RoIAlign, no selection of boxes",
    "segment": "backbone, neck and decode head up to its map of logits, without auxiliary heads (which count "
    "in params) and without enlarging the logits to the image",
}


class DetectorPass(nn.Module):
    """The parts of mmdet's two-stage detector that are counted, one after the other.

    Args:
        detector: Mask R-CNN or Cascade Mask R-CNN.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images_BCHW: Tensor) -> None:
        """(1, 3, H, W) -> nothing: only the operators count."""
        maps = self.detector.extract_feat(images_BCHW)
        self.detector.rpn_head(maps)
        heads = self.detector.roi_head
        for kind, number in (("bbox", BOXES), ("mask", MASKS)):
            extractors = _each(getattr(heads, f"{kind}_roi_extractor"))
            for extractor, head in zip(extractors, _each(getattr(heads, f"{kind}_head")), strict=True):
                side = extractor.roi_layers[0].output_size
                head(maps[0].new_empty(number, extractor.out_channels, *side))


class SegmentorPass(nn.Module):
    """mmseg's segmentor up to the logits.

    Args:
        segmentor: an `EncoderDecoder`.
    """

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.segmentor = segmentor
        # Pooled to 1 x 1, one image is a single value per channel, which batch norm refuses in training.
        segmentor.decode_head.eval()

    def forward(self, images_BCHW: Tensor) -> None:
        """(1, 3, H, W) -> nothing: only the operators count."""
        self.segmentor.decode_head(self.segmentor.extract_feat(images_BCHW))


def dense_cost(recipe: Recipe, stage: DenseStage, image_size: tuple[int, int], num_classes: int) -> Cost:
    """The cost of the network of a recipe's stage for one image.

    Args:
        recipe: its sections `model` and that of the stage say the network.
        image_size: height and width in pixels.
        num_classes: of the heads: 80 on COCO, 150 on ADE20K.

    Raises:
        InputError: when the recipe has no such stage, the network cannot take the size, or its head cannot
            be counted.
    """
    section = getattr(recipe, stage)
    if section is None:
        raise InputError(
            f"The recipe '{recipe.name}' has no stage {stage}",
            where="--stage",
            fix=f"name a recipe with it, for example {_EXAMPLES[stage]}",
        )
    if stage == "segment" and section.head.name == "mask2former":
        raise InputError(
            "The deformable attention of Mask2Former has no operator that can be counted",
            where="segment.head.name",
            fix="count it with another head, for example upernet",
        )
    build = {"detect": _detector, "segment": _segmentor}[stage]
    return measure_cost(lambda: build(recipe, section, num_classes), image_size)


_EXAMPLES = {"detect": "paca/coco", "segment": "paca/ade20k"}


def _detector(recipe: Recipe, section: Any, num_classes: int) -> nn.Module:
    from vitpipe.dense.detector import build_detector, detector_config

    with torch.device("cpu"):  # mmdet reads values of tensors while it is imported
        open_detection()
    # One rank: synchronised batch norm counts the same and needs a GPU.
    config = detector_config(section, recipe.model, num_classes=num_classes, norm="BN")
    return DetectorPass(build_detector(config, section))


def _segmentor(recipe: Recipe, section: Any, num_classes: int) -> nn.Module:
    from vitpipe.dense.segmentor import build_segmentor, segmentor_config

    with torch.device("cpu"):
        open_segmentation(segmentation_head(section.head).packages)
    config = segmentor_config(section, recipe.model, num_classes=num_classes, norm="BN")
    return SegmentorPass(build_segmentor(config, section))


def _each(part: Any) -> Iterable[Any]:
    """The heads of a cascade, or the one of Mask R-CNN."""
    return part if isinstance(part, nn.ModuleList) else (part,)
