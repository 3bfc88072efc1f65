"""The table in which a stage records how each of its numbers was measured.

Recipes state the same settings for published rows (`expect.protocol`); the report puts both side by side,
and a setting that differs makes a number not comparable. So both use the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# The table of sentences that the report puts above a stage's numbers; column `warning`.
WARNINGS = "warnings"
PROTOCOL = "protocol"
# COCO's own definition, which pycocotools and faster-coco-eval share.
COCO_AP = "mean of IoU 0.50 to 0.95, 101 recall points, at most 100 objects per image"
# As mmseg's IoUMetric, and not a mean over the images.
PIXEL_IOU = "mean over classes, of pixels summed over all images"
NOT_AVERAGED = "off"


def protocol_rows(metrics: Iterable[str], settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: every one of these metrics was measured by these settings."""
    return [
        {"metric": metric, "setting": name, "value": str(value)}
        for metric in metrics
        for name, value in settings.items()
    ]


def short_side(image_size: int, crop_ratio: float) -> int:
    """Pixels to which the shorter side is resized before a crop; truncated, as timm does for `crop_pct`."""
    return int(image_size / crop_ratio)


def centre_crop(image_size: int, crop_ratio: float, interpolation: str) -> dict[str, str]:
    """`224 of a 256 short side` and the interpolation, of images that are resized and cropped.

    Args:
        image_size: side of the crop, pixels.
        crop_ratio: of the crop to the resized shorter side.
    """
    return {
        "crop": f"{image_size} of a {short_side(image_size, crop_ratio)} short side",
        "interpolation": interpolation,
    }
