"""iTPN, masked pre-training on pixels: the backbone and the pyramid see a quarter of the units, a light
decoder reconstructs the others.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian, Lingxi Xie, Zhaozhi Wang, Longhui Wei,
Xiaopeng Zhang, Jianbin Jiao, Yaowei Wang, Qi Tian, Qixiang Ye; arXiv 2211.12735, sections 3.2 and 3.3;
supplement, section 2 (masks aligned over all levels, so that nothing leaks) and table 7. Masking and decoder
as in Masked Autoencoders; Kaiming He et al.; arXiv 2111.06377.

    kept units of the image > HiViT > pyramid > one sum per unit > + mask tokens, positions > decoder > pixels

Shapes: B images, N units (row-major), K kept units, h sub-tokens per side, C channels, D decoder width,
the output's D is 16*16*3 pixel values. Parameter names: `backbone.*`, `pyramid.*`, `decoder.mask_token`,
`decoder.embed{16,8,4}.{0,1}` (norm, linear), `decoder.fixed_position` (a buffer), `decoder.blocks.I`,
`decoder.norm`, `decoder.pred`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitpipe.models.blocks import AttentionBlock, init_weights
from vitpipe.models.hivit.hivit import HiViT
from vitpipe.models.hivit.pyramid import Pyramid, PyramidLevels
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

_MLP_RATIO = 4  # of the decoder's blocks, as in the released code


class PixelDecoder(nn.Module):
    """Joins the pyramid levels of the kept units and predicts the pixels of all units.

    Args:
        pyramid_width: channels of the pyramid levels.
        width: D, a multiple of 16 and of `num_heads`.
        depth: attention blocks.
        grid_side: units per side of the images.
        norm_eps: of every LayerNorm.
        init_gain: see `init_weights`.
    """

    # Published size: 8 blocks of width 512 with 16 heads, for base and large (`DecoderConfig`'s defaults).

    def __init__(
        self,
        *,
        pyramid_width: int,
        width: int,
        depth: int,
        num_heads: int,
        grid_side: int,
        norm_eps: float = 1e-6,
        init_gain: float | None = None,
    ) -> None:
        super().__init__()

        def embed(num_tokens: int) -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(pyramid_width, eps=norm_eps), nn.Linear(pyramid_width, width // num_tokens)
            )

        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A buffer and no parameter: the decoder's table stays fixed, unlike the backbone's. It is part of the
        # state because released checkpoints have it.
        self.fixed_position: Tensor
        self.register_buffer("fixed_position", sincos_table(grid_side, width))
        # A unit has 1, 4 and 16 sub-tokens at strides 16, 8, 4: 512 = 4 * 128 = 16 * 32 at the published
        # width.
        self.embed16, self.embed8, self.embed4 = embed(1), embed(4), embed(16)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, num_heads, _MLP_RATIO, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pred = nn.Linear(width, PIXELS_PER_UNIT)
        # Plain, not truncated, normal: so does the released pixel pre-training (its CLIP variant truncates).
        nn.init.normal_(self.mask_token, std=0.02)
        init_weights(self, init_gain)

    def join(self, levels: PyramidLevels, restore_BN: Tensor) -> Tensor:
        """Levels of the kept units -> decoder input (B, N, D), mask tokens where units were hidden.

        Each level is embedded so that the sub-tokens of a unit, flattened, are D wide; the levels are summed.

        Args:
            levels: of the kept units.
            restore_BN: permutation back to image order, see `choose_units`.
        """
        seen_BKD = (
            self.embed16(levels.o16).flatten(2)
            + self.embed8(levels.o8).flatten(2)
            + self.embed4(levels.o4).flatten(2)
        )
        num_images, num_kept, width = seen_BKD.shape
        num_hidden = restore_BN.shape[1] - num_kept
        # The released code fills each of the three levels with the shared mask token before it sums them, so
        # a hidden unit enters as 3 * mask token + position.
        hidden = (3 * self.mask_token).to(seen_BKD.dtype).expand(num_images, num_hidden, width)
        return gather_units(torch.cat([seen_BKD, hidden], dim=1), restore_BN) + self.fixed_position

    def forward(self, levels: PyramidLevels, restore_BN: Tensor) -> Tensor:
        """Levels of the kept units -> pixel values of all units (B, N, 768)."""
        x_BND = self.join(levels, restore_BN)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.pred(self.norm(x_BND))


class MaskedPretrainer(Pretrainer):
    """Backbone, pyramid and decoder.

    The backbone's absolute position starts as the sine-cosine table and stays trainable.

    Args:
        mask_ratio: share of the units that are hidden.

    Raises:
        InputError: when no unit would be left to see, or none to predict.
    """

    # No `no_decay`: the released pre-training decays every tensor of two dimensions or more, position table
    # and mask token included. Its fine-tuning does not.
    family = "hivit"

    def __init__(
        self, backbone: HiViT, pyramid: Pyramid, decoder: PixelDecoder, *, mask_ratio: float = 0.75
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.decoder = backbone, pyramid, decoder
        self.mask_ratio, self.num_units = mask_ratio, backbone.grid_side**2
        check_mask_ratio(self.num_units, mask_ratio)
        # Pixel pre-training starts the table as sine and cosine and trains it; every other phase starts it at
        # random (std 0.02) or loads it.
        if backbone.absolute_position is not None:
            with torch.no_grad():
                backbone.absolute_position.copy_(sincos_table(backbone.grid_side, backbone.widths[-1]))

    @property
    def num_layers(self) -> int:
        """One: pre-training has a single learning rate."""
        return 1

    def layer_of(self, name: str) -> int:
        """0 for every parameter."""
        return 0

    def encode(self, images_BCHW: Tensor, kept_BK: Tensor) -> PyramidLevels:
        """(B, 3, H, W), (B, K) -> pyramid levels of the kept units, (B, K, h, h, D); others are not read."""
        return self.pyramid(self.backbone.forward_stages(images_BCHW, kept_BK))

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MaskedPrediction:
        """Hide units by noise and predict them.

        Args:
            images_BCHW: (B, 3, image_size, image_size), normalised.
            noise_BN: uniform noise per unit, (B, N); see `choose_units`.

        Raises:
            InputError: when images or noise are of another size than the network is built for.
        """
        check_input(images_BCHW, noise_BN, self.backbone.image_size)
        choice = choose_units(noise_BN.to(images_BCHW.device), self.mask_ratio)
        levels = self.encode(images_BCHW, choice.kept_BK)
        return MaskedPrediction(self.decoder(levels, choice.restore_BN), choice.mask_BN, choice.kept_BK)
