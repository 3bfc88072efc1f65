"""A vision transformer as an encoder, with one vector per image, and as a classifier.

What the vector is says `ViTConfig.pooling`: DINO's class token behind the last norm, SelfPatch's aggregation
module behind the trunk, or the mean of the normed patches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.network import Classifier, Encoder, Features
from vitpipe.models.vit.vit import ViT


class ViTEncoder(Encoder):
    """Trunk, and behind it the aggregation module where it has one.

    Args:
        backbone: with a class token, or without.
        aggregation: SelfPatch's module, for a trunk without class token.
    """

    family = "vit"

    def __init__(self, backbone: ViT, aggregation: ClassAttention | None = None) -> None:
        super().__init__()
        # As timm and DeiT in supervised training. DINO and its successors decay them: their methods say so.
        self.no_decay = () if backbone.shape.tokens_decay else ("position", "class_token")
        self.backbone = backbone
        self.aggregation = aggregation

    @property
    def num_layers(self) -> int:
        """Number of layer ids: input, one per block, everything behind them."""
        return len(self.backbone.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter: patches, positions and class token 0, block k its 1-based number."""
        if found := re.match(r"backbone\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        is_input = name.startswith("backbone.") and not name.startswith("backbone.norm")
        return 0 if is_input else self.num_layers - 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the trunk."""
        return len(self.backbone.blocks)

    @property
    def feature_width(self) -> int:
        """C."""
        return self.backbone.shape.width

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Patches of blocks, and the vector of the image behind the last one.

        The attention has the class token first in both axes, where there is one.
        """
        wanted = self.chosen_blocks(blocks)
        found = self.backbone(images_BCHW, (*wanted, -1), attention=attention)
        classes = found.class_tokens
        return Features(
            tokens=found.patches[:-1],
            grids=(self.backbone.grid_of(images_BCHW),) * len(wanted),
            pooled=self.vector_of(found.patches[-1], classes[-1] if classes else None),
            class_tokens=classes[:-1],
            attention=found.attention[:-1],
        )

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The trunk's last norm; unchanged without one."""
        normed: Tensor = self.backbone.norm(tokens)
        return normed

    def vector_of(self, patches_BNC: Tensor, class_BC: Tensor | None) -> Tensor:
        """The vector of each image, (B, C), from what a block puts out."""
        if self.aggregation is not None:
            vector_BC: Tensor = self.aggregation(patches_BNC)
            return vector_BC
        if class_BC is not None:
            return self.final_norm(class_BC)
        return self.final_norm(patches_BNC).mean(dim=1)

    def frozen_features(self, images_BCHW: Tensor, last_blocks: int = 1) -> Tensor:
        """The vectors of the last blocks, concatenated: (B, C * last_blocks)."""
        if last_blocks == 1 or self.aggregation is None:
            return super().frozen_features(images_BCHW, last_blocks)
        blocks = self.chosen_blocks(range(-last_blocks, 0))
        # The module has no class tokens to read: it looks at the patches of every one of these blocks.
        found = self.backbone(images_BCHW, blocks)
        return torch.cat([self.vector_of(patches, None) for patches in found.patches], dim=1)

    def frozen_reading(self, last_blocks: int = 1) -> str:
        """See `Encoder.frozen_reading`."""
        if self.aggregation is None:
            return super().frozen_reading(last_blocks)
        of = "the last block" if last_blocks == 1 else f"each of the last {last_blocks} blocks"
        return f"vector of the aggregation module on the patches of {of}"

    def image_attention(self, images_BCHW: Tensor) -> Tensor | None:
        """Of the class token in the last block, or of the aggregation module's token in its first."""
        grid = self.backbone.grid_of(images_BCHW)
        if self.aggregation is not None:
            share_BHQK = self.aggregation.attention(self.features(images_BCHW).tokens[-1])
        elif self.backbone.class_token is not None:
            share_BHQK = self.features(images_BCHW, attention=True).attention[-1]
        else:
            return None
        return share_BHQK[:, :, 0, 1:].mean(1).unflatten(1, grid)


class ViTClassifier(ViTEncoder, Classifier):
    """The image's vector > Linear.

    Args:
        num_classes: K.
        head_init_std: of the head's weight; `None` for torch's initial values.
    """

    def __init__(
        self,
        backbone: ViT,
        num_classes: int,
        aggregation: ClassAttention | None = None,
        head_init_std: float | None = 0.02,
    ) -> None:
        super().__init__(backbone, aggregation)
        # Without a norm of its own: the vector is behind the trunk's or the module's last norm.
        self.head = nn.Linear(backbone.shape.width, num_classes)
        if head_init_std is not None:
            nn.init.trunc_normal_(self.head.weight, std=head_init_std)
            nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head on the image's vector."""
        logits_BK: Tensor = self.head(features.pooled)
        return logits_BK
