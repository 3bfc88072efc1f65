"""HiViT as an encoder and as a classifier: the mean over the stride-16 tokens, and a head on it.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735, supplement,
table 8.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.models.blocks import AttentionBlock
from vitpipe.models.hivit.config import DECAY_STATED_FOR
from vitpipe.models.hivit.hivit import HiViT, layer_index
from vitpipe.models.masking import grid_of
from vitpipe.models.network import Classifier, Encoder, Features


class HiViTEncoder(Encoder):
    """The backbone; its blocks are those of the last stage, the only ones whose tokens see each other."""

    family = "hivit"
    decay_stated_for = DECAY_STATED_FOR
    # Position tables have two dimensions and more, but the released fine-tuning does not decay them.
    no_decay = ("absolute_position", "relative_table")

    def __init__(self, backbone: HiViT) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: stem, one per block (merges not counted), head."""
        return self.backbone.num_blocks + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `layer_index`."""
        return layer_index(name, self.backbone.shape.depths)

    @property
    def num_blocks(self) -> int:
        """Blocks of stage 16."""
        return len(self.backbone.stage16)

    @property
    def feature_width(self) -> int:
        """C at stride 16."""
        return self.backbone.widths[-1]

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Tokens (B, N, C) at stride 16, and their mean (B, C) behind the last block."""
        backbone, wanted = self.backbone, self.chosen_blocks(blocks)
        x_BNC, rows = backbone.before_stage16(images_BCHW).level16_BNC, backbone.relative_rows()
        tokens: dict[int, Tensor] = {}
        shares: dict[int, Tensor] = {}
        for number, block in enumerate(backbone.stage16):
            if attention and number in wanted:
                assert isinstance(block, AttentionBlock)
                shares[number] = block.attention(x_BNC, rows)
            x_BNC = block(x_BNC, rows)
            if number in wanted:
                tokens[number] = x_BNC
        return Features(
            tokens=tuple(tokens[number] for number in wanted),
            grids=(grid_of(images_BCHW, backbone.shape.name),) * len(wanted),
            pooled=x_BNC.mean(dim=1),
            attention=tuple(shares[number] for number in wanted) if attention else (),
        )


class HiViTClassifier(HiViTEncoder, Classifier):
    """Mean over the stride-16 tokens > LayerNorm > Linear (iTPN, supplement, table 8).

    Args:
        num_classes: K.
        head_init_std: of the head's weight. The default of recipes, 2e-5, is the released value: the logits
            start near 0, so the first gradients into the pre-trained backbone are small.
    """

    def __init__(self, backbone: HiViT, num_classes: int, head_init_std: float = 0.02) -> None:
        super().__init__(backbone)
        # The only norm behind the last block: stage16 ends without one (pre-norm blocks).
        self.head_norm = nn.LayerNorm(backbone.widths[-1], eps=1e-6)
        self.head = nn.Linear(backbone.widths[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_init_std)
        nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head norm and head on the mean."""
        return self.head(self.head_norm(features.pooled))
