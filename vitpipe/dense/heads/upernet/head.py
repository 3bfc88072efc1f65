"""UPerNet's heads, with the settings of iTPN's released configurations (arXiv 2211.12735).

Xiao et al., Unified Perceptual Parsing, arXiv 1807.10221.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import SegmentationHead
from vitpipe.dense.heads.upernet.config import UPerNetConfig

# PSPNet's value (arXiv 1612.01105), as in iTPN's released configurations.
_AUXILIARY_WEIGHT = 0.4
# From stride 16 to 4, 8, 16 and 32.
_NECK_SCALES = (4, 2, 1, 0.5)


class UPerNet(SegmentationHead):
    """A pooling pyramid over all maps, and a convolutional auxiliary head on the map of stride 16."""

    inference = "slide"
    gives_logits = True
    # The pooling pyramid has a branch of 1 x 1 maps.
    needs_two_images = True

    def parts(
        self, head: UPerNetConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """mmseg's `UPerHead` and `FCNHead`, and `MultiLevelNeck` where there is one."""
        shared = {
            "dropout_ratio": 0.1,
            "num_classes": num_classes,
            "norm_cfg": {"type": norm, "requires_grad": True},
            "align_corners": False,
        }
        return {
            **_neck(head, widths),
            "decode_head": {
                "type": "UPerHead",
                "in_channels": list(widths),
                "in_index": [0, 1, 2, 3],
                "pool_scales": (1, 2, 3, 6),
                "channels": head.width,
                "loss_decode": _cross_entropy(1.0),
                **shared,
            },
            "auxiliary_head": {
                "type": "FCNHead",
                "in_channels": widths[head.auxiliary_map],
                "in_index": head.auxiliary_map,
                "channels": head.auxiliary_width,
                "num_convs": 1,
                "concat_input": False,
                "loss_decode": _cross_entropy(_AUXILIARY_WEIGHT),
                **shared,
            },
        }


def _neck(head: UPerNetConfig, widths: Sequence[int]) -> dict[str, Any]:
    """The entry `neck`, if there is one: a 1 x 1 convolution, the resizing, a 3 x 3 convolution per map."""
    if head.neck == "none":
        return {}
    sizes = {"in_channels": list(widths), "out_channels": widths[0], "scales": list(_NECK_SCALES)}
    return {"neck": {"type": "MultiLevelNeck", **sizes}}


def _cross_entropy(weight: float) -> dict[str, Any]:
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}


HEAD = UPerNet()
