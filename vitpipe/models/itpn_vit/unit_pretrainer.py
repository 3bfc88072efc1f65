"""Masked pixels with a plain vision transformer: all levels of the pyramid to the decoder, or the last block.

iTPN: arXiv 2211.12735, supplement, section 3 (table 11). MAE: Masked Autoencoders Are Scalable Vision
Learners; Kaiming He et al.; arXiv 2111.06377, section 3; here without a class token, as the detectors of
iTPN's table 13 have it.

Shapes: B images, N units (row-major), K kept units, C channels, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitpipe.models.blocks import AttentionBlock, init_weights
from vitpipe.models.hivit.config import DecoderConfig
from vitpipe.models.hivit.itpn import PixelDecoder
from vitpipe.models.hivit.pyramid import Pyramid
from vitpipe.models.itpn_vit.unit_vit import UnitViT
from vitpipe.models.masking import (
    PIXELS_PER_UNIT,
    MaskedPrediction,
    check_input,
    check_mask_ratio,
    choose_units,
    gather_units,
)
from vitpipe.models.network import Pretrainer
from vitpipe.models.positions import sincos_table
from vitpipe.models.vit.vit import NORM_EPS

_MLP_RATIO = 4


class LastLevelDecoder(nn.Module):
    """MAE's decoder: the last block's tokens of the kept units to the pixels of all units.

    Args:
        trunk_width: C.
        size: width D, blocks and heads.
        grid_side: units per side of the images.
        init_gain: see `init_weights`.
    """

    def __init__(
        self, trunk_width: int, size: DecoderConfig, *, grid_side: int, init_gain: float | None
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.fixed_position: Tensor
        self.register_buffer("fixed_position", sincos_table(grid_side, size.width))
        # The norm is the last one of MAE's encoder, which fine-tuning throws away as it does the decoder.
        self.embed = nn.Sequential(
            nn.LayerNorm(trunk_width, eps=NORM_EPS), nn.Linear(trunk_width, size.width)
        )
        self.blocks = nn.ModuleList(
            AttentionBlock(size.width, size.heads, _MLP_RATIO, norm_eps=NORM_EPS) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.pred = nn.Linear(size.width, PIXELS_PER_UNIT)
        nn.init.normal_(self.mask_token, std=0.02)
        init_weights(self, init_gain)

    def forward(self, tokens_BKC: Tensor, restore_BN: Tensor) -> Tensor:
        """Tokens of the kept units -> pixel values of all units, (B, N, 768).

        Args:
            tokens_BKC: behind the last block.
            restore_BN: permutation back to image order, see `choose_units`.
        """
        seen_BKD = self.embed(tokens_BKC)
        num_images, num_kept, width = seen_BKD.shape
        hidden = self.mask_token.to(seen_BKD.dtype).expand(num_images, restore_BN.shape[1] - num_kept, width)
        x_BND = gather_units(torch.cat([seen_BKD, hidden], dim=1), restore_BN) + self.fixed_position
        for block in self.blocks:
            x_BND = block(x_BND)
        pixels_BND: Tensor = self.pred(self.norm(x_BND))
        return pixels_BND


class UnitPretrainer(Pretrainer):
    """Trunk, pyramid where there is one, and decoder.

    The trunk's position table starts as sine and cosine and stays trainable, as in iTPN; MAE's is fixed.

    Args:
        decoder: of the pyramid's levels, or of the last block where `pyramid` is `None`.
        mask_ratio: share of the units that are hidden.

    Raises:
        InputError: when no unit would be left to see, or none to predict.
    """

    family = "itpn_vit"

    def __init__(
        self,
        backbone: UnitViT,
        pyramid: Pyramid | None,
        decoder: PixelDecoder | LastLevelDecoder,
        *,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.decoder = backbone, pyramid, decoder
        self.mask_ratio, self.num_units = mask_ratio, backbone.grid_side**2
        check_mask_ratio(self.num_units, mask_ratio)
        with torch.no_grad():
            backbone.absolute_position.copy_(sincos_table(backbone.grid_side, backbone.widths[-1]))
        backbone.absolute_position.requires_grad_(pyramid is not None)

    @property
    def num_layers(self) -> int:
        """One: pre-training has a single learning rate."""
        return 1

    def layer_of(self, name: str) -> int:
        """0 for every parameter."""
        return 0

    def encode(self, images_BCHW: Tensor, kept_BK: Tensor) -> tuple[Tensor, ...]:
        """What the decoder reads of the kept units: `PyramidLevels`, or the last block's tokens alone."""
        if self.pyramid is None:
            return self.backbone.outputs(images_BCHW, self.backbone.level_blocks[-1:], kept_BK)
        levels: tuple[Tensor, ...] = self.pyramid(self.backbone.forward_stages(images_BCHW, kept_BK))
        return levels

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MaskedPrediction:
        """Hide units by noise (uniform, (B, N)) and predict them.

        Raises:
            InputError: when images or noise are of another size than the network is built for.
        """
        check_input(images_BCHW, noise_BN, self.backbone.image_size)
        choice = choose_units(noise_BN.to(images_BCHW.device), self.mask_ratio)
        seen = self.encode(images_BCHW, choice.kept_BK)
        read = seen[0] if self.pyramid is None else seen
        return MaskedPrediction(self.decoder(read, choice.restore_BN), choice.mask_BN, choice.kept_BK)
