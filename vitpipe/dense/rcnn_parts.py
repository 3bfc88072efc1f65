"""Parts of Mask R-CNN and its cascade as mmdet configurations, from the head's settings.

He et al., Mask R-CNN, arXiv 1703.06870. The settings choose between iTPN's released configurations (arXiv
2211.12735: no FPN, a box head of four convolutions and one linear layer, GIoU, arXiv 1902.09630, on decoded
boxes), ViTDet's (arXiv 2203.16527) and mmdetection's standard ones with an FPN (arXiv 1612.03144).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import STRIDES
from vitpipe.dense.heads.mask_rcnn.config import RCNNConfig

# Of the box deltas dx, dy, dw, dh: mmdet's default, the inverse of Detectron2's weights (10, 10, 5, 5).
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
# mmdetection's, where box deltas of proposals have smooth L1: quadratic below it.
_SMOOTH_BELOW = 1.0 / 9.0
# Detectron2's LayerNorm over channels, which ViTDet's heads use; torch's own default is 1e-5.
_NORM_EPS = 1e-6


def neck(head: RCNNConfig, widths: Sequence[int]) -> dict[str, Any]:
    """The entry `neck`, if there is one."""
    if head.neck == "none":
        return {}
    # The fifth map is every second value of the fourth (mmdet's default, as in Detectron2).
    sizes = {"in_channels": list(widths), "out_channels": head.width, "num_outs": len(STRIDES)}
    return {"neck": {"type": "FPN", **sizes}}


def maps_width(head: RCNNConfig, widths: Sequence[int]) -> int:
    """Channels of the maps that the heads read."""
    return widths[0] if head.neck == "none" else head.width


def rpn_head(head: RCNNConfig, width: int) -> dict[str, Any]:
    """The proposal network: one anchor size per level, L1 or smooth L1 on box deltas."""
    smooth = {"type": "SmoothL1Loss", "beta": _SMOOTH_BELOW, "loss_weight": 1.0}
    return {
        "type": "RPNHead",
        "in_channels": width,
        "feat_channels": head.width,
        "num_convs": head.rpn_convs,
        "anchor_generator": {
            # One anchor size per level: the scale times the stride, in pixels.
            "type": "AnchorGenerator",
            "scales": [head.anchor_scale],
            "ratios": [0.5, 1.0, 2.0],
            "strides": list(STRIDES),
        },
        "bbox_coder": _box_coder([1.0, 1.0, 1.0, 1.0]),
        # Object or background by one sigmoid per anchor: binary cross entropy.
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": smooth if head.rpn_loss == "smooth_l1" else _l1(),
    }


def box_head(
    head: RCNNConfig, width: int, num_classes: int, norm: str, stds: tuple[float, ...], *, by_class: bool
) -> dict[str, Any]:
    """Convolutions with norm, linear layers; GIoU on decoded boxes or L1 on box deltas."""
    giou = head.box_loss == "giou"
    return {
        "type": "ConvFCBBoxHead",
        "num_shared_convs": head.box_convs,
        "num_shared_fcs": head.box_linears,
        "in_channels": width,
        "conv_out_channels": head.width,
        "fc_out_channels": head.fc_width,
        "roi_feat_size": 7,
        "num_classes": num_classes,
        "norm_cfg": _layer_norm() if head.norm == "layer" else {"type": norm, "requires_grad": True},
        "bbox_coder": _box_coder(list(stds)),
        "reg_class_agnostic": not by_class,
        "reg_decoded_bbox": giou,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        # Weight 10 as in iTPN's released configurations.
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0} if giou else _l1(),
    }


def mask_head(head: RCNNConfig, width: int, num_classes: int) -> dict[str, Any]:
    """Four convolutions, one transposed one, and a mask per class."""
    return {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": head.width,
        "num_classes": num_classes,
        # Batch norm is for the box head only (iTPN's released configurations).
        "norm_cfg": _layer_norm() if head.norm == "layer" else None,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
    }


def _layer_norm() -> dict[str, Any]:
    return {"type": "LN2d", "eps": _NORM_EPS}


def _l1() -> dict[str, Any]:
    return {"type": "L1Loss", "loss_weight": 1.0}


def _box_coder(stds: list[float]) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": stds}


def roi_extractor(width: int, size: int) -> dict[str, Any]:
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


def _proposal_rules(before_nms: int, kept: int) -> dict[str, Any]:
    return {
        "nms_pre": before_nms,
        "max_per_img": kept,
        "nms": {"type": "nms", "iou_threshold": 0.7},
        "min_bbox_size": 0,
    }


def proposal_training(head: RCNNConfig) -> dict[str, Any]:
    """mmdet's values for Mask R-CNN with FPN, which iTPN's released configurations keep."""
    return {
        "rpn": {
            "assigner": _assigner(0.7, 0.3, 0.3, match_low_quality=True),
            "sampler": _sampler(256, 0.5, with_ground_truth=False),
            # Negative: anchors may reach over the edge of the image.
            "allowed_border": 0 if head.inner_anchors else -1,
            "pos_weight": -1,
            "debug": False,
        },
        # Training keeps twice as many boxes per level before NMS: 2,000 for 1,000 proposals.
        "rpn_proposal": _proposal_rules(2 * head.proposals, head.train_proposals or head.proposals),
    }


def box_training(iou: float, *, match_low_quality: bool) -> dict[str, Any]:
    """Which proposals train a box head, and how many.

    Args:
        iou: least overlap of a positive with its object.
    """
    return {
        "assigner": _assigner(iou, iou, iou, match_low_quality=match_low_quality),
        # Ground-truth boxes are added, so that there are positives while proposals are still poor.
        "sampler": _sampler(512, 0.25, with_ground_truth=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
    }


def test_rules(head: RCNNConfig) -> dict[str, Any]:
    """How boxes are chosen in tests."""
    return {
        "rpn": _proposal_rules(head.proposals, head.proposals),
        "rcnn": {
            # mmdet's and Detectron2's values; COCO evaluates 100 detections per image.
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
            "mask_thr_binary": 0.5,
        },
    }
