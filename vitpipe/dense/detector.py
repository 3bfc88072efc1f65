"""Mask R-CNN and Cascade Mask R-CNN on COCO, as mmdet configuration: the recipe's values and nothing else.

He et al., Mask R-CNN, arXiv 1703.06870, without FPN and with a box head of four convolutions and one layer.
By the recipe either as in iTPN's released configurations (arXiv 2211.12735; GIoU, arXiv 1902.09630, on
decoded boxes) or as in ViTDet's (arXiv 2203.16527); for the cascade's heads see `cascade_head`.
"""

from __future__ import annotations

from typing import Any

from vitpipe.config.recipe import IMAGENET_MEAN, IMAGENET_STD, DetectConfig, ModelConfig

STRIDES = (4, 8, 16, 32, 64)
_PAD_MULTIPLE = 32
_BOX_STDS = (0.1, 0.1, 0.2, 0.2)
_BOX_IOU = 0.5
# Of the cascade's stages; in units of the box weights (10, 5), (20, 10), (30, 15) of other libraries.
_STAGE_STDS = tuple(tuple(std / number for std in _BOX_STDS) for number in (1, 2, 3))
_NORM_EPS = 1e-6
_STAGE_IOUS = (0.5, 0.6, 0.7)


def detector_config(
    detect: DetectConfig, model: ModelConfig, *, num_classes: int, norm: str
) -> dict[str, Any]:
    """The detector.

    Args:
        norm: `SyncBN` or `BN`, for the box head if it has batch norm.
    """
    from vitpipe.dense.backbone import map_widths, maps_config

    backbone = maps_config(detect, model, "detect", model.image_size)
    width = map_widths(backbone)[0]
    cascade = detect.head == "cascade_mask_rcnn"
    return {
        "type": "CascadeRCNN" if cascade else "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": [value * 255 for value in IMAGENET_MEAN],
            "std": [value * 255 for value in IMAGENET_STD],
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": _pad_multiple(detect),
        },
        "backbone": backbone,
        "rpn_head": _rpn_head(detect, width),
        "roi_head": {
            **(_cascade_heads if cascade else _single_head)(detect, width, num_classes, norm),
            "bbox_roi_extractor": _roi_extractor(width, 7),
            "mask_roi_extractor": _roi_extractor(width, 14),
            "mask_head": _mask_head(detect, width, num_classes),
        },
        "train_cfg": {
            **_proposal_training(detect),
            "rcnn": [_box_training(iou, rescue=False) for iou in _STAGE_IOUS]
            if cascade
            else _box_training(_BOX_IOU, rescue=True),
        },
        "test_cfg": _test_rules(detect),
    }


def _pad_multiple(detect: DetectConfig) -> int:
    # After the jitter no side is longer than the square's: one multiple is the square, also in tests.
    return detect.jitter_size if detect.augment == "large_scale_jitter" else _PAD_MULTIPLE


def _rpn_head(detect: DetectConfig, width: int) -> dict[str, Any]:
    return {
        "type": "RPNHead",
        "in_channels": width,
        "feat_channels": detect.head_width,
        "num_convs": detect.rpn_convs,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": [detect.anchor_scale],
            "ratios": [0.5, 1.0, 2.0],
            "strides": list(STRIDES),
        },
        "bbox_coder": _box_coder([1.0, 1.0, 1.0, 1.0]),
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": _l1(),
    }


def _single_head(detect: DetectConfig, width: int, num_classes: int, norm: str) -> dict[str, Any]:
    box_head = _box_head(detect, width, num_classes, norm, _BOX_STDS, by_class=True)
    return {"type": "StandardRoIHead", "bbox_head": box_head}


def _cascade_heads(detect: DetectConfig, width: int, num_classes: int, norm: str) -> dict[str, Any]:
    """Three box heads of equal weight, each on the boxes of the one before; one box for all classes."""
    return {
        "type": "OneMaskCascade",
        "num_stages": len(_STAGE_STDS),
        "stage_loss_weights": [1.0] * len(_STAGE_STDS),
        "bbox_head": [
            _box_head(detect, width, num_classes, norm, stds, by_class=False) for stds in _STAGE_STDS
        ],
    }


def _box_head(
    detect: DetectConfig, width: int, num_classes: int, norm: str, stds: tuple[float, ...], *, by_class: bool
) -> dict[str, Any]:
    """Four convolutions with norm, one layer; GIoU is of decoded boxes, L1 of the deltas themselves."""
    giou = detect.box_loss == "giou"
    return {
        "type": "Shared4Conv1FCBBoxHead",
        "in_channels": width,
        "conv_out_channels": detect.head_width,
        "fc_out_channels": detect.fc_width,
        "roi_feat_size": 7,
        "num_classes": num_classes,
        "norm_cfg": _layer_norm() if detect.head_norm == "layer" else {"type": norm, "requires_grad": True},
        "bbox_coder": _box_coder(list(stds)),
        "reg_class_agnostic": not by_class,
        "reg_decoded_bbox": giou,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0} if giou else _l1(),
    }


def _mask_head(detect: DetectConfig, width: int, num_classes: int) -> dict[str, Any]:
    return {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": detect.head_width,
        "num_classes": num_classes,
        "norm_cfg": _layer_norm() if detect.head_norm == "layer" else None,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
    }


def _layer_norm() -> dict[str, Any]:
    return {"type": "LN2d", "eps": _NORM_EPS}


def _l1() -> dict[str, Any]:
    return {"type": "L1Loss", "loss_weight": 1.0}


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


def _assigner(positive: float, negative: float, min_positive: float, *, rescue: bool) -> dict[str, Any]:
    """`rescue`: a true object that no box overlaps enough takes the nearest above `min_positive`."""
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": min_positive,
        "match_low_quality": rescue,
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


def _proposal_training(detect: DetectConfig) -> dict[str, Any]:
    return {
        "rpn": {
            "assigner": _assigner(0.7, 0.3, 0.3, rescue=True),
            "sampler": _sampler(256, 0.5, with_truth=False),
            "allowed_border": -1,
            "pos_weight": -1,
            "debug": False,
        },
        "rpn_proposal": _proposal_rules(detect, 2 * detect.proposals),
    }


def _box_training(iou: float, *, rescue: bool) -> dict[str, Any]:
    return {
        "assigner": _assigner(iou, iou, iou, rescue=rescue),
        "sampler": _sampler(512, 0.25, with_truth=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
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


def build_detector(config: dict[str, Any]) -> Any:
    """mmdet's detector; `mm_import.open_detection` must have run. Its `init_weights` draws the heads."""
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    # These register what the configuration names.
    import vitpipe.dense.backbone
    import vitpipe.dense.cascade_head
    import vitpipe.dense.layer_norm  # noqa: F401

    return MODELS.build(ConfigDict(config))
