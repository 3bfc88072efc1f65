"""A 1 x 1 convolution and a linear layer per pixel (FCN, arXiv 1411.4038, without its upsampling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.heads.fcn.config import FcnConfig

from vitpipe.dense.head import SegmentationHead


class Fcn(SegmentationHead):
    """mmseg's `FCNHead` on the finest map."""

    inference = "slide"
    gives_logits = True

    def parts(self, head: FcnConfig, *, widths: Sequence[int], num_classes: int, norm: str) -> dict[str, Any]:
        """The decode head alone."""
        return {
            "decode_head": {
                "type": "FCNHead",
                "in_channels": widths[0],
                "in_index": 0,
                "channels": head.width,
                "num_convs": 1,
                "kernel_size": 1,
                "concat_input": False,
                "num_classes": num_classes,
                "norm_cfg": {"type": norm, "requires_grad": True},
                "align_corners": False,
                "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            }
        }


HEAD = Fcn()
