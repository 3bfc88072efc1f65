"""T2T-ViT: a vision transformer behind overlapping windows of tokens, with fixed positions.

Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet; Li Yuan et al.; arXiv 2101.11986.
The transformer is `vit.ViT` with a narrower MLP and without a bias of queries, keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitpipe.models.network import Features
from vitpipe.models.positions import sequence_sincos_table
from vitpipe.models.t2t.performer import NORM_EPS, TokensToToken
from vitpipe.models.vit.vit import Positions, ViT, ViTShape
from vitpipe.models.vit.vit_classifier import ViTClassifier, ViTEncoder

STRIDE = 16


@dataclass(frozen=True)
class T2TShape(ViTShape):
    """One size.

    Attributes:
        inner_width: channels of the tokens in the front end.
        num_features: random features of its performers.
    """

    inner_width: int = 64
    num_features: int = 32
    mlp_ratio: int = 3
    qkv_bias: bool = False
    norm_eps: float = NORM_EPS
    tokens_decay: bool = True  # as in drloc's optimiser


SHAPES: dict[str, T2TShape] = {
    shape.name: shape
    for shape in (
        # Ours. 64 channels need initial values by fan-in, see `init_weights`.
        T2TShape("t2t_nano", 64, 4, 4, init_gain=1.0, inner_width=32, num_features=16),
        T2TShape("t2t_vit_14", 384, 14, 6),
    )
}


class T2T(ViT):
    """Front end > + fixed position > blocks > last norm.

    Args:
        shape: one of `SHAPES`.
        image_size: pixels per side that the position table is made for.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.
    """

    def __init__(self, shape: T2TShape, *, image_size: int, drop_path: float = 0.0) -> None:
        self._shape = shape
        # For other grids as the authors resize it: bicubic, without an offset.
        super().__init__(
            shape, image_size=image_size, patch_size=STRIDE, has_offset=False, drop_path=drop_path
        )

    def _patch_embed(self) -> nn.Module:
        return TokensToToken(self._shape.width, self._shape.inner_width, self._shape.num_features)

    def _add_positions(self, kind: Positions, side: int, *, has_class: bool) -> None:
        """Fixed sines and cosines of the places in the sequence, of which the class token has the first."""
        table_1MC = sequence_sincos_table(1 + side * side, self.shape.width)
        self.register_buffer("class_position", table_1MC[:, :1].clone())
        self.register_buffer("position", table_1MC[:, 1:].clone())


class T2TEncoder(ViTEncoder):
    """The network without a head; blocks are those of the transformer."""

    family = "t2t"

    def location_grid(self, features: Features) -> Tensor:
        """The last block's tokens behind the final norm as a map, (B, C, rows, columns)."""
        # Other networks give theirs before that norm; here drloc's released code reads them behind it.
        tokens_BNC = self.final_norm(features.tokens[-1])
        return tokens_BNC.transpose(1, 2).unflatten(2, features.grids[-1])


class T2TClassifier(T2TEncoder, ViTClassifier):
    """Class token behind the last norm > Linear."""
