"""Settings of PaCa's segmentation head."""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.head import HeadConfig
from vitpipe.config.section import Count, Effects, NotNegative, Ratio

TASK = "segment"


class PacaHeadConfig(HeadConfig):
    """PaCa's head (CVPR 2023, released code): one cluster per class, each learnt from the labels directly.

    `cluster_weight` is that of the clusters' loss, `dropout` drops whole channels before the classifier.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name width cluster_weight dropout",
    )

    name: Literal["paca"] = "paca"
    width: Count = 256
    cluster_weight: NotNegative = 0.4
    dropout: Ratio = 0.1


CONFIG = PacaHeadConfig
