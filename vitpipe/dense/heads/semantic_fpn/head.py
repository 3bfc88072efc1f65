"""Semantic FPN as an mmseg configuration, with the settings of SelfPatch's and XCiT's released ones.

Kirillov et al., Panoptic Feature Pyramid Networks, arXiv 1901.02446.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import STRIDES, SegmentationHead
from vitpipe.dense.heads.semantic_fpn.config import SemanticFPNConfig

_NUM_MAPS = 4


class SemanticFPN(SegmentationHead):
    """An FPN, and per map convolutions with as many doublings as its stride is above the first one's."""

    inference = "whole"
    gives_logits = True

    def parts(
        self, head: SemanticFPNConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """mmseg's `FPN` and `FPNHead`."""
        return {
            "neck": {
                "type": "FPN",
                "in_channels": list(widths),
                "out_channels": head.neck_width,
                "num_outs": _NUM_MAPS,
            },
            "decode_head": {
                "type": "FPNHead",
                "in_channels": [head.neck_width] * _NUM_MAPS,
                "in_index": list(range(_NUM_MAPS)),
                # They set the number of doublings only; what a doubling made is resized to the first map's
                # size. So the maps of a plain transformer, all of one size, take the same head.
                "feature_strides": list(STRIDES[:_NUM_MAPS]),
                "channels": head.width,
                "dropout_ratio": 0.1,
                "num_classes": num_classes,
                "norm_cfg": {"type": norm, "requires_grad": True},
                "align_corners": False,
                "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            },
        }


HEAD = SemanticFPN()
