"""Build a segmentor on ADE20K as an mmseg configuration, from the recipe's values."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from vitpipe.config.dense_sections import COARSEST_STRIDE, SegmentConfig
from vitpipe.config.model import ModelConfig
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.units import counted
from vitpipe.datasets.dense_folder import DenseFolder
from vitpipe.dense.head import segmentation_head

# Label value that neither losses nor metrics count (mmseg's convention).
IGNORED = 255
_MAX_CATEGORY_SHARE = 0.75
_SPLITS = {"train": "training", "val": "validation"}


def segmentor_config(
    segment: SegmentConfig, model: ModelConfig, *, num_classes: int, norm: str
) -> dict[str, Any]:
    """The whole segmentor's configuration.

    Args:
        norm: `SyncBN` or `BN`; used by heads that have batch norm.
    """
    from vitpipe.dense.backbone import map_widths, maps_config

    backbone = maps_config(segment, model, "segment", segment.crop_size)
    widths = map_widths(backbone)
    size = (segment.crop_size, segment.crop_size)
    head = segmentation_head(segment.head)
    test: dict[str, Any] = {"mode": "slide", "crop_size": size, "stride": (segment.stride, segment.stride)}
    # A relative position bias has the size of the training crop. mmseg shifts the last window back into the
    # image; an image that is smaller than the window must be padded.
    test_padding: dict[str, Any] = {"size": size}
    if (segment.inference or head.inference) == "whole":
        whole_multiple = math.lcm(COARSEST_STRIDE, model.token_pixels)
        test, test_padding = {"mode": "whole"}, {"size_divisor": whole_multiple}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            # mmseg loads images by OpenCV as BGR in [0, 255].
            "mean": [value * 255 for value in IMAGENET_MEAN],
            "std": [value * 255 for value in IMAGENET_STD],
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": IGNORED,
            "size": size,
            "test_cfg": test_padding,
        },
        "backbone": backbone,
        **head.parts(segment.head, widths=widths, num_classes=num_classes, norm=norm),
        "train_cfg": {},
        "test_cfg": test,
    }


def _load_image() -> dict[str, Any]:
    # As stored, as its label map and `prepare` have it: mmcv would turn the image by its EXIF tag.
    return {"type": "LoadImageFromFile", "color_type": "color_ignore_orientation"}


def train_pipeline(segment: SegmentConfig) -> list[dict[str, Any]]:
    """Resize, crop, flip and, by the recipe, photometric distortion."""
    crop = (segment.crop_size, segment.crop_size)
    distortion = [{"type": "PhotoMetricDistortion"}] if segment.photometric else []
    return [
        _load_image(),
        {"type": "LoadAnnotations"},
        {
            "type": "RandomResize",
            "scale": segment.scale,
            "ratio_range": segment.resize_range,
            "keep_ratio": True,
        },
        # A crop is drawn again, up to ten times, while one class covers more than this share.
        {"type": "RandomCrop", "crop_size": crop, "cat_max_ratio": _MAX_CATEGORY_SHARE},
        {"type": "RandomFlip", "prob": segment.flip_probability},
        *distortion,
        {"type": "PackSegInputs"},
    ]


def eval_pipeline(segment: SegmentConfig) -> list[dict[str, Any]]:
    """Resize to one size; the label map keeps the original size, at which predictions are evaluated."""
    return [
        _load_image(),
        {"type": "Resize", "scale": segment.scale, "keep_ratio": True},
        # After the resizing, which would resize the label map as well.
        {"type": "LoadAnnotations"},
        {"type": "PackSegInputs"},
    ]


def multi_scale_pipeline(segment: SegmentConfig) -> list[dict[str, Any]]:
    """Test-time augmentation: several sizes and, if asked for, their mirror images; lists in one sample."""
    long_side, short_side = segment.scale
    sizes = [
        {"type": "Resize", "scale": (round(long_side * ratio), round(short_side * ratio)), "keep_ratio": True}
        for ratio in segment.multi_scale_ratios
    ]
    probabilities = (0.0, 1.0) if segment.multi_scale_flips else (0.0,)
    flips = [{"type": "RandomFlip", "prob": probability} for probability in probabilities]
    return [
        _load_image(),
        {
            "type": "TestTimeAug",
            # The label map is loaded after the flip and stays as it is: predictions are flipped back.
            "transforms": [sizes, flips, [{"type": "LoadAnnotations"}], [{"type": "PackSegInputs"}]],
        },
    ]


def build_segmentor(config: dict[str, Any], segment: SegmentConfig) -> Any:
    """Build mmseg's segmentor after `open_segmentation`; its `init_weights` initialises the heads."""
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    import vitpipe.dense.backbone  # noqa: F401  (registers `DenseMaps`)

    segmentation_head(segment.head).register()
    # The mean of the cross entropy is over all pixels, ignored ones included, as in the released
    # configurations (mmseg's default `avg_non_ignore=False`), of which mmseg warns.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*avg_non_ignore.*")
        return MODELS.build(ConfigDict(config))


def ade_dataset(folder: DenseFolder, split: str, pipeline: list[dict[str, Any]]) -> Any:
    """mmseg's dataset over one split of an ADE20K folder; label 0 is ignored, label 1 becomes class 0.

    Args:
        split: `train` or `val`.

    Raises:
        DatasetError: when images or label maps are missing.
    """
    from mmseg.registry import DATASETS

    images, labels = ade_places(folder.root, split)
    return DATASETS.build(
        {
            # Not `ADE20KDataset`, whose 150 class names are fixed: the folder has its own.
            "type": "BaseSegDataset",
            "img_suffix": ".jpg",
            "seg_map_suffix": ".png",
            "data_prefix": {"img_path": str(images), "seg_map_path": str(labels)},
            "metainfo": {"classes": folder.classes},
            "reduce_zero_label": True,
            "ignore_index": IGNORED,
            "test_mode": split == "val",
            # `TestTimeAug` replaces the dictionaries of its transforms by the built objects, in place.
            "pipeline": deepcopy(pipeline),
        }
    )


def ade_places(root: Path, split: str) -> tuple[Path, Path]:
    """Return image folder and label map folder of a split.

    Raises:
        DatasetError: when a folder is missing or empty, or an image has no label map.
    """
    images, labels = root / "images" / _SPLITS[split], root / "annotations" / _SPLITS[split]
    fix = (
        "an ADE20K folder has images/training, images/validation (.jpg) and annotations/training, "
        "annotations/validation (.png of the same names); run the prepare stage again"
    )
    for place, suffix in ((images, ".jpg"), (labels, ".png")):
        if not any(place.glob(f"*{suffix}")):
            raise DatasetError(f"The folder is missing or has no {suffix} files", where=place, fix=fix)
    # mmseg would fail only when it loads the sample.
    orphans = {file.stem for file in images.glob("*.jpg")} - {file.stem for file in labels.glob("*.png")}
    if orphans:
        named = ", ".join(sorted(orphans)[:3])
        raise DatasetError(
            f"{counted(len(orphans), 'image')} without a label map ({named})", where=labels, fix=fix
        )
    return images, labels
