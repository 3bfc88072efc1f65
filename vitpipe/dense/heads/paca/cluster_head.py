"""Segmentation by attention of pixels to clusters; call `mm_import.open_segmentation` before the import.

Grainger et al., PaCa-ViT (CVPR 2023): the head of its released code. A cluster stands for a class and is
learnt from the labels: its scores are logits of that class, with a loss of their own. Layers begin as
mmseg's default has it, which the paper calls Xavier and is Kaiming normal for convolutions with a norm.

Shapes: B images, C_i channels of map i, D channels inside, K classes and clusters, N pixels at stride 4.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import accuracy
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F


class _KeysOrValues(nn.Module):
    """Linear, batch norm over images and clusters, ReLU: (B, K, C) -> (B, K, D)."""

    def __init__(self, width: int, out_width: int, norm: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_width)
        # The two-dimensional one, as everywhere in the head: clusters stand as rows of one column.
        self.norm = build_norm_layer(norm, out_width)[1]

    def forward(self, clusters_BKC: Tensor) -> Tensor:
        """(B, K, C) -> (B, K, D)."""
        mapped_BDK1 = self.linear(clusters_BKC).transpose(1, 2).unsqueeze(-1)
        out: Tensor = F.relu(self.norm(mapped_BDK1)).squeeze(-1).transpose(1, 2)
        return out


@MODELS.register_module()
class ClusterHead(BaseDecodeHead):
    """mmseg's interface of a decode head.

    Args:
        loss_clusters: configuration of the loss of the clusters' scores.
        given: of `BaseDecodeHead`.
    """

    def __init__(self, *, loss_clusters: dict[str, Any], **given: Any) -> None:
        super().__init__(input_transform="multiple_select", **given)
        self.loss_clusters = MODELS.build(loss_clusters)

        def mapped(in_channels: int) -> ConvModule:
            return ConvModule(in_channels, self.channels, 1, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)

        joined = len(self.in_channels) * self.channels
        self.convs = nn.ModuleList(mapped(width) for width in self.in_channels)
        self.q = mapped(joined)
        self.clustering = nn.Sequential(mapped(joined), nn.Conv2d(self.channels, self.num_classes, 1))
        self.k, self.v = (_KeysOrValues(joined, self.channels, self.norm_cfg) for _ in range(2))
        self.proj = mapped(self.channels)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> logits (B, K, H_1, W_1)."""
        return self.both(inputs)[0]

    def both(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits and the scores of the clusters, both (B, K, H_1, W_1)."""
        maps = [conv(x) for conv, x in zip(self.convs, self._transform_inputs(inputs), strict=True)]
        size = maps[0].shape[2:]
        joined_BCHW = torch.cat(
            [resize(x, size=size, mode="bilinear", align_corners=self.align_corners) for x in maps], dim=1
        )
        scores_BKHW = self.clustering(joined_BCHW)
        # Over the pixels of a cluster, not over the clusters of a pixel.
        shares_BKN = scores_BKHW.flatten(2).softmax(dim=-1)
        clusters_BKC = shares_BKN.to(joined_BCHW.dtype) @ joined_BCHW.flatten(2).transpose(1, 2)
        q_BND = self.q(joined_BCHW).flatten(2).transpose(1, 2)
        # One head, and no division by the root of the width.
        out_BND = F.scaled_dot_product_attention(q_BND, self.k(clusters_BKC), self.v(clusters_BKC), scale=1.0)
        out_BDHW = self.proj(out_BND.transpose(1, 2).unflatten(2, size))
        return self.cls_seg(out_BDHW), scores_BKHW

    def loss(
        self, inputs: tuple[Tensor, ...], batch_data_samples: list[Any], train_cfg: Any
    ) -> dict[str, Tensor]:
        """The usual losses of the logits, and with `clusters_` in front those of the clusters' scores."""
        logits, scores = self.both(inputs)
        losses: dict[str, Tensor] = self.loss_by_feat(logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples)
        large = resize(scores, size=labels.shape[2:], mode="bilinear", align_corners=self.align_corners)
        labels = labels.squeeze(1)
        losses["clusters_loss_ce"] = self.loss_clusters(large, labels, ignore_index=self.ignore_index)
        losses["clusters_acc_seg"] = accuracy(large, labels, ignore_index=self.ignore_index)
        return losses
