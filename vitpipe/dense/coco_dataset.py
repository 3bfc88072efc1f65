"""COCO as mmdet reads it: folders, samples, and what happens to an image before the network sees it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vitpipe.config.recipe import DetectConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.dense_folder import DenseFolder

_CROP_RANGE = (384, 600)
_CROP_BRANCH_SIDES = (400, 500, 600)
_MIN_IMAGE_SIDE = 32
_MIN_BOX_SIDE = 0.01
_KEPT_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def train_pipeline(detect: DetectConfig) -> list[dict[str, Any]]:
    """Flip, then another size, and for some a crop."""
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": detect.flip_probability},
        *(_large_scale_jitter(detect) if detect.augment == "large_scale_jitter" else [_many_sizes(detect)]),
        {"type": "PackDetInputs", "meta_keys": _KEPT_META},
    ]


def _many_sizes(detect: DetectConfig) -> dict[str, Any]:
    """One of many sizes; with the crop branch, half of the images are cropped in between.

    The two branches and their sizes are DETR's (arXiv 2005.12872), as in iTPN's released configurations.
    """
    resize = _any_size(detect.short_sides, detect.long_side)
    if not detect.crop_branch:
        return resize
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute_range",
        "crop_size": _CROP_RANGE,
        "allow_negative_crop": True,
    }
    first = _any_size(_CROP_BRANCH_SIDES, detect.long_side)
    return {"type": "RandomChoice", "transforms": [[resize], [first, crop, resize]]}


def _large_scale_jitter(detect: DetectConfig) -> list[dict[str, Any]]:
    """Resized by a random factor, cropped to a square where it is larger; the detector pads the rest.

    Ghiasi et al., Simple Copy-Paste, arXiv 2012.07177, as ViTDet uses it: boxes follow what is left of their
    masks, and a crop without objects is kept.
    """
    size = (detect.jitter_size, detect.jitter_size)
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute",
        "crop_size": size,
        "recompute_bbox": True,
        "allow_negative_crop": True,
    }
    # mmdet's name says the opposite: True would drop the image.
    keep = {"type": "FilterAnnotations", "min_gt_bbox_wh": (_MIN_BOX_SIDE,) * 2, "keep_empty": False}
    resize = {"type": "RandomResize", "scale": size, "ratio_range": detect.jitter_range, "keep_ratio": True}
    return [resize, crop, keep]


def _any_size(short_sides: tuple[int, ...], long_side: int) -> dict[str, Any]:
    scales = [(short, long_side) for short in short_sides]
    return {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True}


def eval_pipeline(detect: DetectConfig) -> list[dict[str, Any]]:
    """One size, no flip."""
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": detect.test_size, "keep_ratio": True},
        {"type": "PackDetInputs", "meta_keys": _KEPT_META[:5]},
    ]


def coco_dataset(folder: DenseFolder, split: str, pipeline: list[dict[str, Any]]) -> Any:
    """mmdet's dataset over one split of a COCO folder.

    In training, images without an object and images with a side below 32 pixels are left out, as in mmdet's
    own configurations; crowds are ignored regions.

    Args:
        split: `train` or `val`.

    Raises:
        DatasetError: when annotations or images are missing, or the annotations cannot be read.
    """
    from mmdet.registry import DATASETS

    annotations, images = coco_places(folder.root, split)
    training = split == "train"
    config = {
        "type": "CocoDataset",
        "ann_file": str(annotations),
        "data_prefix": {"img": str(images)},
        "metainfo": {"classes": folder.classes},
        "filter_cfg": {"filter_empty_gt": True, "min_size": _MIN_IMAGE_SIDE} if training else None,
        "test_mode": not training,
        "pipeline": pipeline,
    }
    # The COCO reader tells its progress on the terminal.
    with contextlib.redirect_stdout(io.StringIO()):
        return DATASETS.build(config)


def padding_groups(detect: DetectConfig, dataset: Any) -> list[int]:
    """Group of each sample: 1 if it is higher than wide, else 0; one group where all are padded alike."""
    if detect.augment == "large_scale_jitter":
        return [0] * len(dataset)
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return [int(info["height"] > info["width"]) for info in infos]


def coco_places(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Raises:
        DatasetError: when one is missing or the annotations are not COCO's.
    """
    annotations = root / "annotations" / f"instances_{split}2017.json"
    images = root / f"{split}2017"
    fix = (
        "a COCO folder has annotations/instances_train2017.json, annotations/instances_val2017.json, "
        "train2017/ and val2017/; run the prepare stage again"
    )
    if not annotations.is_file():
        raise DatasetError("The annotation file is missing", where=annotations, fix=fix)
    if not images.is_dir():
        raise DatasetError("The image folder is missing", where=images, fix=fix)
    try:
        content = json.loads(annotations.read_bytes())
        missing = {"images", "annotations", "categories"} - set(content)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"The annotation file cannot be read ({error})", where=annotations, fix=fix
        ) from error
    if missing:
        raise DatasetError(
            f"The annotation file has no {', '.join(sorted(missing))}", where=annotations, fix=fix
        )
    return annotations, images
