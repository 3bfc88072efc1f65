"""Mask2Former on ADE20K as an mmseg configuration; its parts are mmdet's.

Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527, with the
settings of its released ADE20K configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import SegmentationHead
from vitpipe.dense.heads.mask2former.config import Mask2FormerConfig

# Of the losses and of the matching costs alike, as in the paper.
_CLASS_WEIGHT, _MASK_WEIGHT, _DICE_WEIGHT = 2.0, 5.0, 5.0
# Most queries match nothing: without a lower weight this class would outweigh all others (DETR's value).
_NO_OBJECT_WEIGHT = 0.1
# PointRend's values (arXiv 1912.08193): three times the points are drawn; 75 % of those kept are the most
# uncertain ones.
_OVERSAMPLE_RATIO = 3.0
_IMPORTANCE_RATIO = 0.75
# Strides 32, 16 and 8 in turn; the map of stride 4 is only multiplied with the queries to give masks.
_NUM_ATTENDED_MAPS = 3
_NUM_NORM_GROUPS = 32
_STRIDES = (4, 8, 16, 32)


def _decode_head(head: Mask2FormerConfig, widths: Sequence[int], num_classes: int) -> dict[str, Any]:
    """The decode head's configuration.

    Args:
        widths: channels of the maps at strides 4, 8, 16 and 32.
    """
    # Half of the channels for each axis.
    positions = {"num_feats": head.width // 2, "normalize": True}
    return {
        # Registered in `full_precision`; names without the prefix `mmdet.` are looked up in mmseg's scope.
        "type": "FullPrecisionMask2Former",
        "in_channels": list(widths),
        "strides": list(_STRIDES),
        "feat_channels": head.width,
        "out_channels": head.width,
        "num_classes": num_classes,
        "num_queries": head.queries,
        "num_transformer_feat_level": _NUM_ATTENDED_MAPS,
        "align_corners": False,
        "pixel_decoder": _pixel_decoder(head, positions),
        # The pixel decoder's maps have the decoder's width already.
        "enforce_decoder_input_project": False,
        "positional_encoding": positions,
        "transformer_decoder": _decoder(head),
        **_losses(num_classes),
        "train_cfg": {
            "num_points": head.points,
            "oversample_ratio": _OVERSAMPLE_RATIO,
            "importance_sample_ratio": _IMPORTANCE_RATIO,
            "assigner": {"type": "mmdet.HungarianAssigner", "match_costs": _match_costs()},
            "sampler": {"type": "mmdet.MaskPseudoSampler"},
        },
    }


def _pixel_decoder(head: Mask2FormerConfig, positions: dict[str, Any]) -> dict[str, Any]:
    attention = {
        "embed_dims": head.width,
        "num_heads": head.heads,
        "num_levels": _NUM_ATTENDED_MAPS,
        "num_points": 4,
        "dropout": 0.0,
        "batch_first": True,
    }
    return {
        "type": "mmdet.MSDeformAttnPixelDecoder",
        "num_outs": _NUM_ATTENDED_MAPS,
        "norm_cfg": {"type": "GN", "num_groups": _NUM_NORM_GROUPS},
        "act_cfg": {"type": "ReLU"},
        "encoder": {
            "num_layers": head.encoder_layers,
            "layer_cfg": {
                "self_attn_cfg": attention,
                # Half of the decoder's width, as released (1024 and 2048).
                "ffn_cfg": _feed_forward(head.width, head.feed_forward_width // 2),
            },
        },
        "positional_encoding": positions,
    }


def _decoder(head: Mask2FormerConfig) -> dict[str, Any]:
    attention = {"embed_dims": head.width, "num_heads": head.heads, "batch_first": True}
    return {
        # Every layer's prediction has a loss of its own.
        "return_intermediate": True,
        "num_layers": head.decoder_layers,
        "layer_cfg": {
            "self_attn_cfg": attention,
            "cross_attn_cfg": attention,
            "ffn_cfg": _feed_forward(head.width, head.feed_forward_width),
        },
        "init_cfg": None,
    }


def _feed_forward(width: int, hidden_width: int) -> dict[str, Any]:
    return {
        "embed_dims": width,
        "feedforward_channels": hidden_width,
        "num_fcs": 2,
        "ffn_drop": 0.0,
        "act_cfg": {"type": "ReLU", "inplace": True},
    }


def _losses(num_classes: int) -> dict[str, Any]:
    return {
        "loss_cls": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": _CLASS_WEIGHT,
            "reduction": "mean",
            # "No object" is the last class.
            "class_weight": [1.0] * num_classes + [_NO_OBJECT_WEIGHT],
        },
        "loss_mask": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": True,
            "loss_weight": _MASK_WEIGHT,
            "reduction": "mean",
        },
        "loss_dice": {
            "type": "mmdet.DiceLoss",
            "use_sigmoid": True,
            "activate": True,
            "reduction": "mean",
            # Sums, not sums of squares, and 1 in numerator and denominator, as in the authors' code.
            "naive_dice": True,
            "eps": 1.0,
            "loss_weight": _DICE_WEIGHT,
        },
    }


def _match_costs() -> list[dict[str, Any]]:
    return [
        {"type": "mmdet.ClassificationCost", "weight": _CLASS_WEIGHT},
        {"type": "mmdet.CrossEntropyLossCost", "weight": _MASK_WEIGHT, "use_sigmoid": True},
        {"type": "mmdet.DiceCost", "weight": _DICE_WEIGHT, "pred_act": True, "eps": 1.0},
    ]


class Mask2Former(SegmentationHead):
    """Queries that attend to masked regions; scores are sums of probabilities over the queries."""

    packages = ("mmdet.models",)
    inference = "whole"
    gives_logits = False

    def register(self) -> None:
        """Register the head that runs in float32."""
        import vitpipe.dense.heads.mask2former.full_precision  # noqa: F401

    def parts(
        self, head: Mask2FormerConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """mmseg's `Mask2FormerHead`, which has group norm only."""
        return {"decode_head": _decode_head(head, widths, num_classes)}


HEAD = Mask2Former()
