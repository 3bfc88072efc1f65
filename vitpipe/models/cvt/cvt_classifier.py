"""CvT as an encoder and as a classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.models.cvt.cvt import CvT
from vitpipe.models.network import Classifier, Encoder, Features


class CvtEncoder(Encoder):
    """The network without a head; blocks are those of all stages, with the grid and width of their stage.

    Args:
        backbone: the network without a head.
    """

    family = "cvt"

    def __init__(self, backbone: CvT) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: first embedding, one per block, head."""
        return self.backbone.shape.num_blocks + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; the embedding of a later stage has that of the block before it."""
        found = re.match(r"backbone\.stages\.(\d+)\.(?:blocks\.(\d+)\.)?", name)
        if found is None:
            return self.num_layers - 1
        before = sum(self.backbone.shape.depths[: int(found[1])])
        return before if found[2] is None else before + int(found[2]) + 1

    @property
    def num_blocks(self) -> int:
        """Of all stages."""
        return self.backbone.shape.num_blocks

    @property
    def feature_width(self) -> int:
        """C of the last stage."""
        return self.backbone.shape.widths[-1]

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Tokens of blocks, and the mean of the last block's; no norm follows it.

        Raises:
            InputError: no such block; attention is asked for (its keys lie on another grid); an image that is
                too small.
        """
        self.refuse_attention(attention)
        wanted = self.chosen_blocks(blocks)
        last_BCRS, found = self.backbone(images_BCHW, wanted)
        return Features(
            tokens=tuple(found[number].flatten(2).transpose(1, 2) for number in wanted),
            grids=tuple((found[number].shape[2], found[number].shape[3]) for number in wanted),
            pooled=last_BCRS.mean(dim=(2, 3)),
        )


class CvtClassifier(CvtEncoder, Classifier):
    """Mean of the last block's tokens > Linear, with torch's initial values.

    Args:
        num_classes: K.
    """

    def __init__(self, backbone: CvT, num_classes: int) -> None:
        super().__init__(backbone)
        self.head = nn.Linear(backbone.shape.widths[-1], num_classes)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head on the mean."""
        logits_BK: Tensor = self.head(features.pooled)
        return logits_BK
