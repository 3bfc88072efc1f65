"""Build a detector on COCO as an mmdet configuration, from the recipe's values."""

from __future__ import annotations

from typing import Any

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.config.model import ModelConfig
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.dense.head import detection_head


def detector_config(
    detect: DetectConfig, model: ModelConfig, *, num_classes: int, norm: str
) -> dict[str, Any]:
    """The whole detector's configuration.

    Args:
        norm: `SyncBN` or `BN`; used by heads that have batch norm.
    """
    from vitpipe.dense.backbone import map_widths, maps_config

    backbone = maps_config(detect, model, "detect", model.image_size)
    parts = detection_head(detect.head).parts
    return {
        **parts(detect.head, widths=map_widths(backbone), num_classes=num_classes, norm=norm),
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            # mmdet loads images by OpenCV as BGR in [0, 255].
            "mean": [value * 255 for value in IMAGENET_MEAN],
            "std": [value * 255 for value in IMAGENET_STD],
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": detect.pad_multiple,
        },
        "backbone": backbone,
    }


def build_detector(config: dict[str, Any], detect: DetectConfig) -> Any:
    """Build mmdet's detector after `mm_import.open_detection`; its `init_weights` initialises the heads."""
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    import vitpipe.dense.backbone  # noqa: F401  (registers `DenseMaps`)

    detection_head(detect.head).register()
    return MODELS.build(ConfigDict(config))
