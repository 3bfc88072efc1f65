"""Mask R-CNN on COCO, as mmdet configuration: built from the recipe's values and nothing else.

He et al., Mask R-CNN, arXiv 1703.06870, with the settings of iTPN's released configurations (arXiv
2211.12735): no FPN, a box head of four convolutions and one layer, GIoU (arXiv 1902.09630) on decoded boxes.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vitpipe.config.recipe import IMAGENET_MEAN, IMAGENET_STD, DetectConfig, ModelConfig
from vitpipe.data.dense import DenseFolder
from vitpipe.errors import DatasetError

STRIDES = (4, 8, 16, 32, 64)
_PAD_MULTIPLE = 32
_CROP_RANGE = (384, 600)
_CROP_BRANCH_SIDES = (400, 500, 600)
_MIN_IMAGE_SIDE = 32
_KEPT_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def detector_config(
    detect: DetectConfig, model: ModelConfig, *, num_classes: int, norm: str
) -> dict[str, Any]:
    """The detector.

    Args:
        norm: `SyncBN` or `BN`, for the box head.
    """
    from vitpipe.dense.backbone import map_widths, maps_config

    backbone = maps_config(detect, model, "detect", model.image_size)
    width = map_widths(backbone)[0]
    return {
        "type": "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": [value * 255 for value in IMAGENET_MEAN],
            "std": [value * 255 for value in IMAGENET_STD],
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": _PAD_MULTIPLE,
        },
        "backbone": backbone,
        "rpn_head": _rpn_head(detect, width),
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": _roi_extractor(width, 7),
            "bbox_head": _box_head(detect, width, num_classes, norm),
            "mask_roi_extractor": _roi_extractor(width, 14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": width,
                "conv_out_channels": detect.head_width,
                "num_classes": num_classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": _train_rules(detect),
        "test_cfg": _test_rules(detect),
    }


def _rpn_head(detect: DetectConfig, width: int) -> dict[str, Any]:
    return {
        "type": "RPNHead",
        "in_channels": width,
        "feat_channels": detect.head_width,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": [detect.anchor_scale],
            "ratios": [0.5, 1.0, 2.0],
            "strides": list(STRIDES),
        },
        "bbox_coder": _box_coder([1.0, 1.0, 1.0, 1.0]),
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    }


def _box_head(detect: DetectConfig, width: int, num_classes: int, norm: str) -> dict[str, Any]:
    """Four convolutions with batch norm, one layer; boxes are decoded before the loss."""
    return {
        "type": "Shared4Conv1FCBBoxHead",
        "in_channels": width,
        "conv_out_channels": detect.head_width,
        "fc_out_channels": detect.fc_width,
        "roi_feat_size": 7,
        "num_classes": num_classes,
        "norm_cfg": {"type": norm, "requires_grad": True},
        "bbox_coder": _box_coder([0.1, 0.1, 0.2, 0.2]),
        "reg_class_agnostic": False,
        "reg_decoded_bbox": True,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
    }


def _box_coder(stds: list[float]) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": stds}


def _roi_extractor(width: int, size: int) -> dict[str, Any]:
    """RoIAlign from strides 4 to 32."""
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": width,
        "featmap_strides": list(STRIDES[:4]),
    }


def _assigner(positive: float, negative: float, min_positive: float) -> dict[str, Any]:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": min_positive,
        "match_low_quality": True,
        "ignore_iof_thr": -1,
    }


def _sampler(num_samples: int, positive_ratio: float, *, with_truth: bool) -> dict[str, Any]:
    return {
        "type": "RandomSampler",
        "num": num_samples,
        "pos_fraction": positive_ratio,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": with_truth,
    }


def _proposal_rules(detect: DetectConfig, before_nms: int) -> dict[str, Any]:
    return {
        "nms_pre": before_nms,
        "max_per_img": detect.proposals,
        "nms": {"type": "nms", "iou_threshold": 0.7},
        "min_bbox_size": 0,
    }


def _train_rules(detect: DetectConfig) -> dict[str, Any]:
    return {
        "rpn": {
            "assigner": _assigner(0.7, 0.3, 0.3),
            "sampler": _sampler(256, 0.5, with_truth=False),
            "allowed_border": -1,
            "pos_weight": -1,
            "debug": False,
        },
        "rpn_proposal": _proposal_rules(detect, 2 * detect.proposals),
        "rcnn": {
            "assigner": _assigner(0.5, 0.5, 0.5),
            "sampler": _sampler(512, 0.25, with_truth=True),
            "mask_size": 28,
            "pos_weight": -1,
            "debug": False,
        },
    }


def _test_rules(detect: DetectConfig) -> dict[str, Any]:
    return {
        "rpn": _proposal_rules(detect, detect.proposals),
        "rcnn": {
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
            "mask_thr_binary": 0.5,
        },
    }


def train_pipeline(detect: DetectConfig) -> list[dict[str, Any]]:
    """Flip, then one of many sizes; with the crop branch, half of the images are cropped in between.

    The two branches and their sizes are DETR's (arXiv 2005.12872), as in iTPN's released configurations.
    """
    resize = _any_size(detect.short_sides, detect.long_side)
    steps: list[dict[str, Any]] = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": detect.flip_probability},
    ]
    if detect.crop_branch:
        crop = {
            "type": "RandomCrop",
            "crop_type": "absolute_range",
            "crop_size": _CROP_RANGE,
            "allow_negative_crop": True,
        }
        first = _any_size(_CROP_BRANCH_SIDES, detect.long_side)
        steps.append({"type": "RandomChoice", "transforms": [[resize], [first, crop, resize]]})
    else:
        steps.append(resize)
    return [*steps, {"type": "PackDetInputs", "meta_keys": _KEPT_META}]


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


def build_detector(config: dict[str, Any]) -> Any:
    """mmdet's detector; `library.open_detection` must have run. Its `init_weights` draws the heads."""
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    import vitpipe.dense.backbone  # noqa: F401  (registers DenseMaps)

    return MODELS.build(ConfigDict(config))


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


def standing(dataset: Any) -> list[int]:
    """1 for each sample of a COCO dataset that is higher than wide, else 0."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return [int(info["height"] > info["width"]) for info in infos]


def coco_places(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Raises:
        DatasetError: when one is missing or the annotations are not COCO's.
    """
    annotations = root / "annotations" / f"instances_{split}2017.json"
    images = root / f"{split}2017"
    mend = (
        "a COCO folder has annotations/instances_train2017.json, annotations/instances_val2017.json, "
        "train2017/ and val2017/; run the prepare stage again"
    )
    if not annotations.is_file():
        raise DatasetError("The annotation file is missing", where=annotations, mend=mend)
    if not images.is_dir():
        raise DatasetError("The image folder is missing", where=images, mend=mend)
    try:
        content = json.loads(annotations.read_bytes())
        missing = {"images", "annotations", "categories"} - set(content)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"The annotation file cannot be read ({error})", where=annotations, mend=mend
        ) from error
    if missing:
        raise DatasetError(
            f"The annotation file has no {', '.join(sorted(missing))}", where=annotations, mend=mend
        )
    return annotations, images
