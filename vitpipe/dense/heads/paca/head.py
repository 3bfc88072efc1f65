"""PaCa's segmentation head as an mmseg configuration (Grainger et al., CVPR 2023, released code)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.dense.head import SegmentationHead
from vitpipe.dense.heads.paca.config import PacaHeadConfig


class Paca(SegmentationHead):
    """Pixels attend to one cluster per class, formed over all maps."""

    inference = "whole"
    gives_logits = True

    def register(self) -> None:
        """Register the head."""
        import vitpipe.dense.heads.paca.cluster_head  # noqa: F401

    def parts(
        self, head: PacaHeadConfig, *, widths: Sequence[int], num_classes: int, norm: str
    ) -> dict[str, Any]:
        """`ClusterHead`, without an auxiliary head."""
        return {
            "decode_head": {
                "type": "ClusterHead",
                "in_channels": list(widths),
                "in_index": list(range(len(widths))),
                "channels": head.width,
                "dropout_ratio": head.dropout,
                "num_classes": num_classes,
                "norm_cfg": {"type": norm, "requires_grad": True},
                "align_corners": False,
                "loss_decode": _cross_entropy(1.0),
                "loss_clusters": _cross_entropy(head.cluster_weight),
            }
        }


def _cross_entropy(weight: float) -> dict[str, Any]:
    # The mean is over the pixels that have a class, unlike in UPerNet's released configurations.
    return {"type": "CrossEntropyLoss", "loss_weight": weight, "avg_non_ignore": True}


HEAD = Paca()
