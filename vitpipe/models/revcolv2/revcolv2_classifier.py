"""RevColV2 as an encoder (bottom-up columns) and as a classifier (the top of the top-down columns).

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005: the linear probe reads level 3 of the last bottom-up column (supplement, section 2.2),
classification that of the last top-down column.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.network import Classifier, Encoder, Features
from vitpipe.models.revcolv2.columns import NORM_EPS, NUM_LEVELS
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Network
from vitpipe.models.reversible import States

_TOP = NUM_LEVELS - 1


class RevColV2Encoder(RevColV2Network, Encoder):
    """The bottom-up columns; the blocks of `features` are the four levels of the last of them.

    The top-down columns are neither run nor trained here, but remain in the state: weights of a whole network
    fit, and those of this one start a classifier or dense features.

    Args:
        backbone: changed: parameters that the features do not depend on no longer require gradients.
    """

    def __init__(self, backbone: RevColV2) -> None:
        super().__init__(backbone)
        self._release_unused(backbone)

    def _release_unused(self, backbone: RevColV2) -> None:
        """Take gradients from what is not run.

        DistributedDataParallel would wait for their gradients, and weight decay would shrink them.
        """
        backbone.top_down.requires_grad_(False)
        backbone.top_down_pos_embed.requires_grad_(False)

    @property
    def num_blocks(self) -> int:
        """4."""
        return NUM_LEVELS

    @property
    def feature_width(self) -> int:
        """C, the same at every level."""
        return self.backbone.shape.width

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Levels of the last bottom-up column as tokens (B, N, C), and the mean of level 3 (B, C)."""
        self.refuse_attention(attention)
        levels = self.backbone.encode(self.backbone.embed(images_BCHW))
        return _features_of(levels, self.chosen_blocks(blocks))


class RevColV2Classifier(RevColV2Encoder, Classifier):
    """Mean over level 3 of the last top-down column > LayerNorm > Linear.

    Level 3 comes first in a top-down column, so the output does not depend on most other levels of these
    columns. They are neither run nor trained here, but remain in the state.

    Args:
        backbone: changed: parameters of the unused levels no longer require gradients.
        num_classes: K.
        head_init_std: of the head's weight.
    """

    def __init__(self, backbone: RevColV2, num_classes: int, head_init_std: float = 2e-5) -> None:
        super().__init__(backbone)
        width = backbone.shape.width
        norm, linear = nn.LayerNorm(width, eps=NORM_EPS), nn.Linear(width, num_classes)
        # The default, 2e-5, is the general std of 0.02 times the published head init of 0.001 (tables 2 to
        # 4).
        nn.init.trunc_normal_(linear.weight, std=head_init_std)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(OrderedDict(norm=norm, fc=linear))
        self._num_classes = num_classes

    def _release_unused(self, backbone: RevColV2) -> None:
        top_down = backbone.columns[backbone.shape.num_bottom_up :]
        for column, num_used in zip(top_down, backbone.positions_for_top, strict=True):
            for position in range(num_used, NUM_LEVELS):
                column.level(position).requires_grad_(False)
                column.scales()[position].requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self._num_classes

    def forward_features(self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,)) -> Features:
        """Level 3 of the last top-down column as tokens (B, N, C), and its mean (B, C).

        Raises:
            InputError: when another block is asked for: the levels below are not run.
        """
        backbone, wanted = self.backbone, self.chosen_blocks(blocks)
        if set(wanted) - {_TOP}:
            raise InputError(
                "Of the top-down columns only the top level is run in classification",
                where="blocks",
                fix=f"ask for block {_TOP} here, or for those of the bottom-up columns by `features`",
            )
        states = backbone.join(backbone.encode(backbone.embed(images_BCHW)))
        top = backbone.decode_top(states)
        return _features_of((top,), (0,) * len(wanted))

    def logits(self, features: Features) -> Tensor:
        """LayerNorm and Linear on the mean."""
        return self.head(features.pooled)


def _features_of(levels_BHWC: States, wanted: Sequence[int]) -> Features:
    """Maps of some levels as tokens, pooled over the last level."""
    maps = [levels_BHWC[number] for number in wanted]
    return Features(
        tokens=tuple(x_BHWC.flatten(1, 2) for x_BHWC in maps),
        grids=tuple((x_BHWC.shape[1], x_BHWC.shape[2]) for x_BHWC in maps),
        pooled=levels_BHWC[-1].mean(dim=(1, 2)),
    )
