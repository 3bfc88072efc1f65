"""COCO as an mmdet dataset: folders, data pipelines for training and evaluation, groups for padding."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import write_whole
from vitpipe.datasets.dense_folder import DenseFolder
from vitpipe.datasets.layouts.coco_annotations import instances_of, read_annotations
from vitpipe.datasets.layouts.file_tree import FolderTree

# Pixels, as in DETR (arXiv 2005.12872) and iTPN's released configurations.
_CROP_RANGE = (384, 600)
_CROP_BRANCH_SIDES = (400, 500, 600)
# mmdet's default of `filter_cfg` for COCO.
_MIN_IMAGE_SIDE = 32
# Pixels; mmdet's value for large-scale jitter: it removes only boxes that the crop left without area.
_MIN_BOX_SIDE = 0.01
# The last two are written by the flip, which evaluation does not have.
_KEPT_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def train_pipeline(detect: DetectConfig) -> list[dict[str, Any]]:
    """Random flip, then random resizing with or without a crop, as the recipe chooses."""
    return [
        _load_image(),
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": detect.flip_probability},
        *(_large_scale_jitter(detect) if detect.augment == "large_scale_jitter" else [_multi_scale(detect)]),
        {"type": "PackDetInputs", "meta_keys": _KEPT_META},
    ]


def _load_image() -> dict[str, Any]:
    # As stored, as the annotations' pixels and `prepare` have it: mmcv would turn it by its EXIF tag.
    return {"type": "LoadImageFromFile", "color_type": "color_ignore_orientation"}


def _multi_scale(detect: DetectConfig) -> dict[str, Any]:
    """Resize to a random short side; with the crop branch, half of the images are cropped in between."""
    resize = _any_size(detect.short_sides, detect.long_side)
    if not detect.crop_branch:
        return resize
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute_range",
        "crop_size": _CROP_RANGE,
        # A crop without objects is kept; else mmdet would put a random other image in its place.
        "allow_negative_crop": True,
    }
    first = _any_size(_CROP_BRANCH_SIDES, detect.long_side)
    return {"type": "RandomChoice", "transforms": [[resize], [first, crop, resize]]}


def _large_scale_jitter(detect: DetectConfig) -> list[dict[str, Any]]:
    """Large-scale jitter (Ghiasi et al., Simple Copy-Paste, arXiv 2012.07177), as in ViTDet.

    The image is resized by a random factor and cropped to a square where it is larger; the detector's data
    preprocessor pads it where it is smaller.
    """
    size = (detect.jitter_size, detect.jitter_size)
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute",
        "crop_size": size,
        # Boxes are fitted to the visible part of their masks, as in Detectron2.
        "recompute_bbox": True,
        "allow_negative_crop": True,
    }
    # mmdet 3.5.1 names it the wrong way round: `keep_empty=True` returns None for an image without boxes, and
    # the dataset then draws another image.
    keep = {"type": "FilterAnnotations", "min_gt_bbox_wh": (_MIN_BOX_SIDE,) * 2, "keep_empty": False}
    resize = {"type": "RandomResize", "scale": size, "ratio_range": detect.jitter_range, "keep_ratio": True}
    return [resize, crop, keep]


def _any_size(short_sides: tuple[int, ...], long_side: int) -> dict[str, Any]:
    scales = [(short, long_side) for short in short_sides]
    return {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True}


def eval_pipeline(detect: DetectConfig) -> list[dict[str, Any]]:
    """Resize to the test size, without flip; annotations are read by the evaluator, not here."""
    return [
        _load_image(),
        {"type": "Resize", "scale": detect.test_size, "keep_ratio": True},
        {"type": "PackDetInputs", "meta_keys": _KEPT_META[:5]},
    ]


def coco_dataset(folder: DenseFolder, split: str, pipeline: list[dict[str, Any]]) -> Any:
    """mmdet's dataset over one split of a COCO folder.

    Training skips images without objects and images with a side below 32 pixels, as mmdet's configurations
    do; crowds are ignored regions.

    Args:
        split: `train` or `val`.

    Raises:
        DatasetError: when annotations or images are missing, or the annotations cannot be read.
    """
    from mmdet.registry import DATASETS

    annotations = coco_annotations(folder, split)
    training = split == "train"
    config = {
        "type": "CocoDataset",
        "ann_file": str(annotations),
        "data_prefix": {"img": str(folder.root / f"{split}2017")},
        # mmdet's own class list is COCO's 80; the folder may have others.
        "metainfo": {"classes": folder.classes},
        "filter_cfg": {"filter_empty_gt": True, "min_size": _MIN_IMAGE_SIDE} if training else None,
        "test_mode": not training,
        "pipeline": pipeline,
    }
    # pycocotools prints "loading annotations into memory..." to stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = DATASETS.build(config)
    if not len(dataset):
        raise DatasetError(
            f"No image of {split} has an object that can be trained on",
            where=annotations,
            fix=f"use images of at least {_MIN_IMAGE_SIDE} pixels a side, and objects of at least one",
        )
    return dataset


def padding_groups(detect: DetectConfig, dataset: Any) -> list[int]:
    """Group number of each sample: 1 for portrait images, 0 for landscape and square ones.

    A batch is padded to its largest height and width: mixed orientations would be padded most.
    """
    # After the jitter every image is padded to the same square.
    if detect.augment == "large_scale_jitter":
        return [0] * len(dataset)
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return [int(info["height"] > info["width"]) for info in infos]


def coco_annotations(folder: DenseFolder, split: str) -> Path:
    """The annotation file of a split: the set's own, or a repaired copy where `prepare` had to repair it.

    Raises:
        DatasetError: when it is missing, damaged or of no use.
        StorageError: when the copy cannot be written.
    """
    tree = FolderTree(folder.root)
    annotations = read_annotations(tree, split, outlines=True)
    if not annotations.is_repaired:
        return folder.root / instances_of(split)
    # Named by the set's content: another version of the set gets another file.
    copy = folder.scratch / f"annotations-{folder.digest[:16]}-{split}.json"
    # Several ranks write the same bytes; each replaces the file at once.
    with disk_errors(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_whole(copy, json.dumps(annotations.content))
    return copy
