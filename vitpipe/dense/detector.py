"""Build Mask R-CNN and Cascade Mask R-CNN on COCO as mmdet configurations, from the recipe's values.

He et al., Mask R-CNN, arXiv 1703.06870, without FPN and with a box head of four convolutions and one linear
layer. The recipe chooses between iTPN's released configurations (arXiv 2211.12735; GIoU, arXiv 1902.09630, on
decoded boxes) and ViTDet's (arXiv 2203.16527); for the cascade's heads see `cascade_head`.
"""

from __future__ import annotations

from typing import Any

from vitpipe.config.recipe import IMAGENET_MEAN, IMAGENET_STD, DetectConfig, ModelConfig

# Five maps as from an FPN; there is none: the pyramid's maps go straight to the heads.
STRIDES = (4, 8, 16, 32, 64)
_PAD_MULTIPLE = 32
# Of the box deltas dx, dy, dw, dh: mmdet's default, the inverse of Detectron2's weights (10, 10, 5, 5).
_BOX_STDS = (0.1, 0.1, 0.2, 0.2)
_BOX_IOU = 0.5
# Cascade stages: the inverse of Detectron2's weights (10, 5), (20, 10), (30, 15) for positions and sizes.
_STAGE_STDS = tuple(tuple(std / number for std in _BOX_STDS) for number in (1, 2, 3))
# Detectron2's LayerNorm over channels, which ViTDet's heads use; torch's own default is 1e-5.
_NORM_EPS = 1e-6
# As in the Cascade R-CNN paper.
_STAGE_IOUS = (0.5, 0.6, 0.7)


def detector_config(
    detect: DetectConfig, model: ModelConfig, *, num_classes: int, norm: str
) -> dict[str, Any]:
    """The whole detector's configuration.

    Args:
        norm: `SyncBN` or `BN`; used by the box head if it has batch norm.
    """
    from vitpipe.dense.backbone import map_widths, maps_config

    backbone = maps_config(detect, model, "detect", model.image_size)
    width = map_widths(backbone)[0]
    cascade = detect.head == "cascade_mask_rcnn"
    return {
        "type": "CascadeRCNN" if cascade else "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            # mmdet loads images by OpenCV as BGR in [0, 255].
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
            "rcnn": [_box_training(iou, match_low_quality=False) for iou in _STAGE_IOUS]
            if cascade
            else _box_training(_BOX_IOU, match_low_quality=True),
        },
        "test_cfg": _test_rules(detect),
    }


def _pad_multiple(detect: DetectConfig) -> int:
    # After the jitter no side is longer than the square's, so padding to a multiple of its side gives the
    # square, in training and in evaluation.
    return detect.jitter_size if detect.augment == "large_scale_jitter" else _PAD_MULTIPLE


def _rpn_head(detect: DetectConfig, width: int) -> dict[str, Any]:
    return {
        "type": "RPNHead",
        "in_channels": width,
        "feat_channels": detect.head_width,
        "num_convs": detect.rpn_convs,
        "anchor_generator": {
            # One anchor size per level: the scale times the stride, in pixels.
            "type": "AnchorGenerator",
            "scales": [detect.anchor_scale],
            "ratios": [0.5, 1.0, 2.0],
            "strides": list(STRIDES),
        },
        "bbox_coder": _box_coder([1.0, 1.0, 1.0, 1.0]),
        # Object or background by one sigmoid per anchor: binary cross entropy.
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": _l1(),
    }


def _single_head(detect: DetectConfig, width: int, num_classes: int, norm: str) -> dict[str, Any]:
    box_head = _box_head(detect, width, num_classes, norm, _BOX_STDS, by_class=True)
    return {"type": "StandardRoIHead", "bbox_head": box_head}


def _cascade_heads(detect: DetectConfig, width: int, num_classes: int, norm: str) -> dict[str, Any]:
    """Three box heads of equal weight, each refining the boxes of the one before; class-agnostic boxes."""
    return {
        "type": "OneMaskCascade",
        "num_stages": len(_STAGE_STDS),
        # mmdet's default is 1, 0.5, 0.25; ViTDet's stages weigh the same.
        "stage_loss_weights": [1.0] * len(_STAGE_STDS),
        "bbox_head": [
            _box_head(detect, width, num_classes, norm, stds, by_class=False) for stds in _STAGE_STDS
        ],
    }


def _box_head(
    detect: DetectConfig, width: int, num_classes: int, norm: str, stds: tuple[float, ...], *, by_class: bool
) -> dict[str, Any]:
    """Four convolutions with norm and one linear layer; GIoU on decoded boxes or L1 on box deltas."""
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
        # Weight 10 as in iTPN's released configurations.
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0} if giou else _l1(),
    }


def _mask_head(detect: DetectConfig, width: int, num_classes: int) -> dict[str, Any]:
    return {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": detect.head_width,
        "num_classes": num_classes,
        # Batch norm is for the box head only (iTPN's released configurations).
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
    """RoIAlign on the maps of strides 4 to 32; stride 64 is for proposals only."""
    return {
        "type": "SingleRoIExtractor",
        # Ratio 0: as many samples per bin as the region has pixels there.
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": width,
        "featmap_strides": list(STRIDES[:4]),
    }


def _assigner(
    positive: float, negative: float, min_positive: float, *, match_low_quality: bool
) -> dict[str, Any]:
    """IoU thresholds for positive and negative boxes.

    Args:
        match_low_quality: an object whose best box is below `positive` takes it if above `min_positive`.
    """
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": min_positive,
        "match_low_quality": match_low_quality,
        # Negative: boxes that lie on crowds count as background (mmdet's default).
        "ignore_iof_thr": -1,
    }


def _sampler(num_samples: int, positive_ratio: float, *, with_ground_truth: bool) -> dict[str, Any]:
    return {
        "type": "RandomSampler",
        "num": num_samples,
        "pos_fraction": positive_ratio,
        # No limit on negatives per positive.
        "neg_pos_ub": -1,
        "add_gt_as_proposals": with_ground_truth,
    }


def _proposal_rules(detect: DetectConfig, before_nms: int) -> dict[str, Any]:
    return {
        "nms_pre": before_nms,
        "max_per_img": detect.proposals,
        "nms": {"type": "nms", "iou_threshold": 0.7},
        "min_bbox_size": 0,
    }


def _proposal_training(detect: DetectConfig) -> dict[str, Any]:
    """mmdet's values for Mask R-CNN with FPN, which iTPN's released configurations keep."""
    return {
        "rpn": {
            "assigner": _assigner(0.7, 0.3, 0.3, match_low_quality=True),
            "sampler": _sampler(256, 0.5, with_ground_truth=False),
            # Anchors may reach over the edge of the image.
            "allowed_border": -1,
            "pos_weight": -1,
            "debug": False,
        },
        # Training keeps twice as many boxes per level before NMS: 2,000 for 1,000 proposals.
        "rpn_proposal": _proposal_rules(detect, 2 * detect.proposals),
    }


def _box_training(iou: float, *, match_low_quality: bool) -> dict[str, Any]:
    return {
        "assigner": _assigner(iou, iou, iou, match_low_quality=match_low_quality),
        # Ground-truth boxes are added, so that there are positives while proposals are still poor.
        "sampler": _sampler(512, 0.25, with_ground_truth=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
    }


def _test_rules(detect: DetectConfig) -> dict[str, Any]:
    return {
        "rpn": _proposal_rules(detect, detect.proposals),
        "rcnn": {
            # mmdet's and Detectron2's values; COCO evaluates 100 detections per image.
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
            "mask_thr_binary": 0.5,
        },
    }


def build_detector(config: dict[str, Any]) -> Any:
    """Build mmdet's detector after `mm_import.open_detection`; its `init_weights` initialises the heads."""
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    # Importing these registers the types that the configuration names.
    import vitpipe.dense.backbone
    import vitpipe.dense.cascade_head
    import vitpipe.dense.layer_norm  # noqa: F401

    return MODELS.build(ConfigDict(config))
