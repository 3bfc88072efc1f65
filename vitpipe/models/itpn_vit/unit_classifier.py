"""The trunk as an encoder and as a classifier: mean over the last block's tokens > LayerNorm > Linear.

As iTPN's HiViT (arXiv 2211.12735, supplement, table 8) and MAE's released fine-tuning have it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.models.hivit.config import DECAY_STATED_FOR
from vitpipe.models.itpn_vit.unit_vit import UnitViT, layer_index
from vitpipe.models.network import Classifier, Encoder, Features
from vitpipe.models.vit.vit import NORM_EPS


class UnitEncoder(Encoder):
    """The trunk."""

    family = "itpn_vit"
    decay_stated_for = DECAY_STATED_FOR
    no_decay = ("position", "relative_table")

    def __init__(self, backbone: UnitViT) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: input, one per block, everything behind them."""
        return len(self.backbone.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `layer_index`."""
        return layer_index(name, len(self.backbone.blocks))

    @property
    def num_blocks(self) -> int:
        """Blocks of the trunk."""
        return len(self.backbone.blocks)

    @property
    def feature_width(self) -> int:
        """C."""
        return self.backbone.widths[-1]

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Tokens (B, N, C) of blocks, and the mean (B, C) behind the last one."""
        wanted = self.chosen_blocks(blocks)
        self.refuse_attention(attention)
        *tokens, last_BNC = self.backbone.outputs(images_BCHW, (*wanted, self.num_blocks - 1))
        grids = (self.backbone.grid_of(images_BCHW),) * len(wanted)
        return Features(tokens=tuple(tokens), grids=grids, pooled=last_BNC.mean(dim=1))


class UnitClassifier(UnitEncoder, Classifier):
    """Mean over the tokens > LayerNorm > Linear.

    Args:
        num_classes: K.
        head_init_std: of the head's weight.
    """

    def __init__(self, backbone: UnitViT, num_classes: int, head_init_std: float) -> None:
        super().__init__(backbone)
        self.head_norm = nn.LayerNorm(self.feature_width, eps=NORM_EPS)
        self.head = nn.Linear(self.feature_width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_init_std)
        nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head norm and head on the mean."""
        logits_BK: Tensor = self.head(self.head_norm(features.pooled))
        return logits_BK
