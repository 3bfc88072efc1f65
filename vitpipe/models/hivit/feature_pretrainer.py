"""iTPN, masked pre-training on the features of a teacher such as CLIP.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735; supplement,
section 1 (supervision at three quarters of the last stage), section 2 (masks aligned over all levels) and
table 9; the rest as in the released code for CLIP.

    image > strides 4, 8 > mask token at hidden units > stride 16 > pyramid > one sum per unit > features
                                                            \\-- at 3/4 of its blocks > two blocks > features

Unlike on pixels every unit is processed. Shapes: B images, N units (row-major), C channels at stride 16, D
channels of the teacher's features. Parameter names: `backbone.*`, `pyramid.*`, `predictor.mask_token`,
`predictor.embed{16,8,4}.{0,1}` (norm, linear), `predictor.{norm,pred}`, `predictor.early_blocks.I`,
`predictor.{early_norm,early_pred}`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import AttentionBlock, init_weights
from vitpipe.models.hivit.hivit import HiddenUnits, HiViT
from vitpipe.models.hivit.pyramid import Pyramid, PyramidLevels
from vitpipe.models.network import FeaturePrediction, FeaturePredictor

_NORM_EPS = 1e-6
# torch's default: the released code does not set it in the two auxiliary blocks.
_EARLY_NORM_EPS = 1e-5
_NUM_EARLY_BLOCKS = 2
# Supplement, section 1: three quarters of the third stage; in the released code the block of index 18 of 24.
_EARLY_SHARE = 0.75


class FeatureHeads(nn.Module):
    """Mask token, the head on the pyramid, and the auxiliary head on an earlier block.

    Args:
        backbone: that they belong to.
        pyramid_width: channels of the pyramid levels.
        target_width: D.
        layer_scale: of the auxiliary blocks, as the backbone's.
    """

    def __init__(
        self, backbone: HiViT, *, pyramid_width: int, target_width: int, layer_scale: float | None
    ) -> None:
        super().__init__()
        shape, width = backbone.shape, backbone.widths[-1]

        def embed(num_tokens: int) -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(pyramid_width, eps=_NORM_EPS), nn.Linear(pyramid_width, width // num_tokens)
            )

        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        # A unit has 1, 4 and 16 sub-tokens at strides 16, 8, 4; flattened, each level is C wide.
        self.embed16, self.embed8, self.embed4 = embed(1), embed(4), embed(16)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.pred = nn.Linear(width, target_width)
        # With the drop ratios of the backbone's blocks from the tap on.
        ratios = backbone.drop_ratios[-len(backbone.stage16) :]
        first = early_block(len(ratios))
        relative = backbone.grid_side if backbone.relative_index_NN is not None else None
        self.early_blocks = nn.ModuleList(
            AttentionBlock(
                width,
                shape.num_heads,
                shape.mlp_ratio,
                norm_eps=_EARLY_NORM_EPS,
                drop_ratio=ratios[min(first + number, len(ratios) - 1)],
                layer_scale=layer_scale,
                relative_grid=relative,
            )
            for number in range(_NUM_EARLY_BLOCKS)
        )
        self.early_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.early_pred = nn.Linear(width, target_width)
        init_weights(self, shape.init_gain)

    def main(self, levels: PyramidLevels) -> Tensor:
        """Pyramid levels -> features (B, N, D)."""
        x_BNC = (
            self.embed16(levels.o16).flatten(2)
            + self.embed8(levels.o8).flatten(2)
            + self.embed4(levels.o4).flatten(2)
        )
        return self.pred(self.norm(x_BNC))

    def early(self, x_BNC: Tensor, index_NN: Tensor | None) -> Tensor:
        """Tokens of the tapped block -> features (B, N, D)."""
        for block in self.early_blocks:
            x_BNC = block(x_BNC, index_NN)
        return self.early_pred(self.early_norm(x_BNC))


class FeaturePretrainer(FeaturePredictor):
    """Backbone, pyramid and heads.

    Args:
        aligned: hidden units give the pyramid nothing of strides 4 and 8 either. The supplement asks for it;
            the released code lets these pass.
    """

    family = "hivit"
    # Relative tables and the mask token decay, as in the released code.
    no_decay = ("absolute_position",)

    def __init__(
        self, backbone: HiViT, pyramid: Pyramid, predictor: FeatureHeads, *, aligned: bool = True
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.predictor = backbone, pyramid, predictor
        self.aligned, self.grid_side = aligned, backbone.grid_side

    @property
    def num_layers(self) -> int:
        """One: pre-training has a single learning rate."""
        return 1

    def layer_of(self, name: str) -> int:
        """0 for every parameter."""
        return 0

    def forward(self, images_BCHW: Tensor, mask_BN: Tensor) -> FeaturePrediction:
        """Hide units and predict the features of all.

        Args:
            images_BCHW: (B, 3, image_size, image_size), normalised.
            mask_BN: 1 where a unit is hidden, 0 where it is seen.

        Raises:
            InputError: when the mask has another number of units than the network is built for, or as
                `HiViT.forward_stages`.
        """
        if mask_BN.shape[1] != self.grid_side**2:
            raise InputError(
                f"The mask has {mask_BN.shape[1]} units, the network is built for {self.grid_side**2}",
                where="pretrain",
                fix="make the mask for the network's grid of units",
            )
        hidden = HiddenUnits(mask_BN, self.predictor.mask_token)
        stages = self.backbone.before_stage16(images_BCHW, hidden=hidden)
        x_BNC, index_NN = stages.level16_BNC, self.backbone.relative_rows()
        tapped, early_BNC = early_block(len(self.backbone.stage16)), x_BNC
        for number, block in enumerate(self.backbone.stage16):
            x_BNC = block(x_BNC, index_NN)
            if number == tapped:
                early_BNC = x_BNC
        seen_BN = 1 - mask_BN if self.aligned else None
        levels = self.pyramid(stages._replace(level16_BNC=x_BNC), seen_BN)
        return FeaturePrediction(self.predictor.main(levels), self.predictor.early(early_BNC, index_NN))


def early_block(depth: int) -> int:
    """Index of the block whose output is supervised early: 18 of 24, 30 of 40."""
    return int(_EARLY_SHARE * depth)
