"""PaCa-ViT as an encoder, as a classifier, and as dense features."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.models.network import Classifier, DenseBackbone, Encoder, Features, Network
from vitpipe.models.paca.clustering import as_map
from vitpipe.models.paca.paca import PaCa
from vitpipe.models.paca.paca_shapes import NUM_STAGES, Four


class PacaNetwork(Network):
    """Common to all: the layers of the learning rate.

    Args:
        backbone: the network without a head.
    """

    family = "paca"

    def __init__(self, backbone: PaCa) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: stem (and teacher), one per block, everything behind them."""
        return self.backbone.shape.num_blocks + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; a transition and a stage's norm have that of the block before them."""
        depths = self.backbone.shape.depths
        found = re.match(r"backbone\.(stages|norms|transitions)\.(\d+)\.(?:(\d+)\.)?", name)
        if found is None:
            return 0 if name.startswith("backbone.") else self.num_layers - 1
        stage = int(found[2])
        if found[1] == "stages":
            return sum(depths[:stage]) + int(found[3]) + 1
        return sum(depths[: stage + 1])


class PacaEncoder(PacaNetwork, Encoder):
    """Blocks are those of all stages; tokens have the grid and width of their stage."""

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
        """Tokens of blocks, and the mean of the last stage's normed tokens.

        The attention of a stage with clusters is to its M clusters, (B, H, N, M).
        """
        wanted = self.chosen_blocks(blocks)
        found = self.backbone(images_BCHW, wanted, attention=attention)
        return Features(
            tokens=tuple(found.tokens[number] for number in wanted),
            grids=tuple(found.grids[number] for number in wanted),
            pooled=found.stages[-1].tokens.mean(dim=1),
            attention=tuple(found.attention[number] for number in wanted) if attention else (),
        )

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm of the last stage, for its tokens; those of earlier stages stay as they are."""
        if tokens.shape[-1] != self.feature_width:
            return tokens
        normed: Tensor = self.backbone.norms[-1](tokens)
        return normed

    def assignment(self, images_BCHW: Tensor, stage: int) -> tuple[Tensor, tuple[int, int]]:
        """See `Encoder.assignment`; of a stage in which every block assigns anew, that of the first one."""
        return self.backbone.assignment(images_BCHW, stage)

    def image_attention(self, images_BCHW: Tensor) -> Tensor | None:
        """Mean over patches and heads of what the last block takes of each patch, through its clusters."""
        number = self.num_blocks - 1
        found = self.backbone(images_BCHW, [number], attention=True)
        share_BK = found.attention[number].mean(dim=(1, 2))
        shares_BMN = found.stages[-1].shares
        if shares_BMN is not None:
            share_BK = (share_BK.unsqueeze(1) @ shares_BMN.float()).squeeze(1)
        return share_BK.unflatten(1, found.grids[number])


class PacaClassifier(PacaEncoder, Classifier):
    """Mean of the last stage's normed tokens > Linear.

    Args:
        num_classes: K.
        head_init_std: of the head's weight.
    """

    def __init__(self, backbone: PaCa, num_classes: int, head_init_std: float = 0.02) -> None:
        super().__init__(backbone)
        self.head = nn.Linear(backbone.shape.widths[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_init_std)
        nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head on the mean."""
        logits_BK: Tensor = self.head(features.pooled)
        return logits_BK


class PacaMaps(PacaNetwork, DenseBackbone):
    """The normed tokens of the four stages as maps, strides 4 to 32, sides rounded up.

    Args:
        pretrained: clusters of the four stages in pre-training; where the network has others, the last maps
            of the clusterings begin anew.
    """

    def __init__(self, backbone: PaCa, pretrained: Four) -> None:
        super().__init__(backbone)
        changed = [stage for stage in range(NUM_STAGES) if backbone.clusters[stage] != pretrained[stage]]
        owners = [f"stages.{stage}." for stage in changed]
        owners += [f"teacher.to_clusters.{stage}." for stage in changed]
        self.restarted = tuple(
            name
            for name, _ in self.named_parameters()
            if ".to_clusters." in name and any(owner in name for owner in owners)
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return self.backbone.shape.widths

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H / s, W / s).

        Raises:
            InputError: when a side is below 32 pixels.
        """
        return tuple(as_map(stage.tokens, stage.grid) for stage in self.backbone(images_BCHW).stages)
