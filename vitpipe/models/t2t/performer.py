"""The front end of T2T-ViT: windows of tokens become tokens, with attention of linear cost in between.

Tokens-to-Token ViT; Li Yuan et al.; arXiv 2101.11986, section 3.1, in its form with performers: Rethinking
Attention with Performers; Krzysztof Choromanski et al.; arXiv 2009.14794, with the positive features of its
equation 5.

Shapes: B images, N tokens on a grid in row-major order, C channels, c inner channels, M random features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.blocks import Mlp, dropout

NORM_EPS = 1e-5
_DIVISION_EPS = 1e-8
_DROPOUT = 0.1
# Sides of the three windows, in pixels or tokens, with stride and padding.
_WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


class Performer(nn.Module):
    """Attention by random features with one head, and an MLP: (B, N, C) -> (B, N, c).

    Args:
        width: C.
        inner_width: c.
        num_features: M, at most c.
    """

    random_features: Tensor

    def __init__(self, width: int, inner_width: int, num_features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        # Outputs are ordered key, query, value, as in released weights.
        self.kqv = nn.Linear(width, 3 * inner_width)
        self.proj = nn.Linear(inner_width, inner_width)
        self.norm2 = nn.LayerNorm(inner_width, eps=NORM_EPS)
        self.mlp = Mlp(inner_width, inner_width)
        # A buffer: never trained, but a part of the function, and so stored with the weights.
        features_Mc = nn.init.orthogonal_(torch.empty(num_features, inner_width))
        self.register_buffer("random_features", features_Mc * math.sqrt(num_features))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, c)."""
        values_BNc, y_BNc = self._attended(x_BNC)
        # The shortcut begins at the values: the input has another width.
        x_BNc = values_BNc + dropout(self.proj(y_BNc), _DROPOUT, self.training)
        return x_BNc + dropout(self.mlp(self.norm2(x_BNc)), _DROPOUT, self.training)

    def _attended(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and what attention makes of them, (B, N, c) each."""
        # In float32 also under autocast: an error of bfloat16's eight bits in the exponent of a feature would
        # be one of several percent in the feature.
        enabled = x_BNC.device.type != "meta" and torch.is_autocast_enabled(x_BNC.device.type)
        with torch.autocast(x_BNC.device.type if enabled else "cpu", enabled=False):
            k_BNc, q_BNc, v_BNc = self.kqv(self.norm1(x_BNC.float())).chunk(3, dim=-1)
            k_BNM, q_BNM = self._features(k_BNc), self._features(q_BNc)
            total_BMc, total_BM1 = k_BNM.transpose(1, 2) @ v_BNc, k_BNM.sum(dim=1).unsqueeze(2)
            return v_BNc, q_BNM @ total_BMc / (q_BNM @ total_BM1 + _DIVISION_EPS)

    def _features(self, x_BNc: Tensor) -> Tensor:
        """`exp(W x - |x|^2 / 2) / sqrt(M)`, whose products approximate those of softmax attention."""
        exponent_BNM = x_BNc @ self.random_features.t() - x_BNc.square().sum(-1, keepdim=True) / 2
        return exponent_BNM.exp() / math.sqrt(len(self.random_features))


class TokensToToken(nn.Module):
    """Images to a map of tokens at stride 16, made of overlapping windows: (B, 3, H, W) -> (B, C, R, S).

    Args:
        width: C.
        inner_width: of the tokens in between.
        num_features: of the performers.
    """

    def __init__(self, width: int, inner_width: int, num_features: int) -> None:
        super().__init__()
        first, second, third = (side * side for side, _, _ in _WINDOWS)
        self.attention1 = Performer(3 * first, inner_width, num_features)
        self.attention2 = Performer(inner_width * second, inner_width, num_features)
        self.project = nn.Linear(inner_width * third, width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 16, W / 16)."""
        layers = (self.attention1, self.attention2, self.project)
        x_BCRS = images_BCHW
        for layer, (side, stride, padding) in zip(layers, _WINDOWS, strict=True):
            rows, columns = ((n + 2 * padding - side) // stride + 1 for n in x_BCRS.shape[2:])
            # Channels of a window are ordered by channel, row, column.
            windows_BNC = F.unfold(x_BCRS, side, stride=stride, padding=padding).transpose(1, 2)
            x_BCRS = layer(windows_BNC).transpose(1, 2).unflatten(2, (rows, columns))
        return x_BCRS
