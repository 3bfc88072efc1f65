"""The two residual blocks that HiViT, the pyramid, the masked decoder and plain transformers consist of.

HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling; Xiaosong Zhang, Yunjie Tian, Wei Huang,
Qixiang Ye, Qi Dai, Lingxi Xie, Qi Tian; arXiv 2205.14949, section 3 (a channel MLP where a token may not
look at its neighbours, global attention where one unit is one token).

Shapes: B images, N tokens, C channels, H heads, c = C / H channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models import draws

# Where the tokens of an attention are: rows of a bias table, or rows and columns of their grid.
Places = Tensor | tuple[int, int] | None


def init_weights(module: nn.Module, gain: float | None = None) -> None:
    """Initialise all Linear layers inside: weights truncated normal, biases 0; the rest is unchanged.

    Args:
        module: changed in place.
        gain: `None` for a std of 0.02, as in the papers, which fits widths of several hundred; a number for
            `gain / sqrt(inputs)`, which narrow networks need: with 0.02 their residual branches add almost
            nothing at first.
    """
    # Linear layers only: the released networks leave the stem's convolution at torch's default (Kaiming
    # uniform, a = sqrt(5)). The cut at +-2 (trunc_normal_'s default) is an absolute value, 100 std at 0.02.
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 if gain is None else gain / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def drop_path(x: Tensor, drop_ratio: float, training: bool) -> Tensor:
    """Drop a residual branch for whole images (stochastic depth; Huang et al., arXiv 1603.09382).

    Args:
        x: (B, ...).
        drop_ratio: share of images that lose the branch; the others are divided by the keep ratio.
        training: nothing is dropped outside training.
    """
    if drop_ratio == 0.0 or not training:
        return x
    keep_ratio = 1.0 - drop_ratio
    # One draw per image: with a draw per element this would be dropout. In training it belongs to the image,
    # so that another micro-batch size drops the same branches.
    kept = draws.keep(x.shape[0], keep_ratio, x).view(-1, *(1,) * (x.ndim - 1))
    # Divided by the keep ratio, so that the branch keeps its mean and evaluation needs no factor.
    return x * kept.div_(keep_ratio)


class BranchDrop(nn.Module):
    """`drop_path` as a module, in the place of timm's `DropPath`.

    Args:
        drop_ratio: share of images that lose the branch.
    """

    # timm's draws from torch's generator: another micro-batch size would drop other branches.
    def __init__(self, drop_ratio: float) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        return drop_path(x, self.drop_ratio, self.training)


def dropout(x: Tensor, drop_ratio: float, training: bool) -> Tensor:
    """Dropout (Srivastava et al., JMLR 15, 2014) whose draws belong to the image.

    Args:
        x: (B, ...).
        drop_ratio: share of elements that become 0; the others are divided by the keep ratio.
        training: nothing is dropped outside training.
    """
    # torch's own draws for a whole batch: another micro-batch size would drop other elements.
    if drop_ratio == 0.0 or not training:
        return x
    keep_ratio = 1.0 - drop_ratio
    return x * draws.keep_elements(x, keep_ratio).div_(keep_ratio)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on the last axis: (..., C) -> (..., C).

    Args:
        width: C.
        hidden_width: between the two.
        dropout: ratio behind both layers.
    """

    def __init__(self, width: int, hidden_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # The erf form (torch's default), as in the released code of iTPN, MAE and RevCol; not the tanh one.
        hidden = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(hidden), self.dropout, self.training)


def attend(q_BHNc: Tensor, k_BHNc: Tensor, v_BHNc: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v: (B, H, N, c).

    Args:
        bias: added to the scores, broadcastable to (B, H, N, N).
    """
    # torch's fused kernel for CPUs has no gradient for a bias: it falls back to one that is slower than the
    # formula (1.2 times at 196 tokens). On a GPU, and without that gradient, a fused kernel is faster.
    if bias is not None and bias.requires_grad and bias.device.type == "cpu":
        scores_BHNN = (q_BHNc * q_BHNc.shape[-1] ** -0.5) @ k_BHNc.transpose(-2, -1) + bias
        return scores_BHNN.softmax(dim=-1) @ v_BHNc
    return F.scaled_dot_product_attention(q_BHNc, k_BHNc, v_BHNc, attn_mask=bias)


class Attention(nn.Module):
    """Global multi-head self-attention, optionally with a learnt bias per relative position.

    Args:
        width: channels, divisible by `num_heads`.
        num_heads: H.
        relative_grid: units per side S of the grid the bias is made for; `None` for no bias. The table is
            ((2S-1)^2, H).
        qkv_bias: of the layer of queries, keys and values.
        dropout: ratio behind the last layer.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        relative_grid: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        # One matrix; its outputs are ordered q, k, v, then head, then channel of the head, as in released
        # weights.
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.relative_table: nn.Parameter | None = None
        if relative_grid is not None:
            # Zero: a network that has just got the bias is the same function as without it.
            self.relative_table = nn.Parameter(torch.zeros((2 * relative_grid - 1) ** 2, num_heads))

    def forward(self, x_BNC: Tensor, where: Places = None) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Args:
            x_BNC: tokens.
            where: rows of the bias table for each query and key, (N, N), or (B, N, N) where every image
                has its own tokens. Needed if, and only if, there is a table.
        """
        num_images, num_tokens, width = x_BNC.shape
        q_BHNc, k_BHNc, v_BHNc = self._queries_keys_values(x_BNC)
        bias = self.bias_of(q_BHNc, where)
        out_BHNc = attend(q_BHNc, k_BHNc, v_BHNc, None if bias is None else bias.to(q_BHNc.dtype))
        out_BNC = self.proj(out_BHNc.transpose(1, 2).reshape(num_images, num_tokens, width))
        return dropout(out_BNC, self.dropout, self.training)

    def bias_of(self, q_BHNc: Tensor, where: Places) -> Tensor | None:
        """What is added to the scores, broadcastable to (B, H, N, N); `None` for nothing."""
        if self.relative_table is None:
            return None
        assert isinstance(where, Tensor)
        return self._bias(where)

    def probabilities(self, x_BNC: Tensor, where: Places = None) -> Tensor:
        """(B, N, C) -> (B, H, N, N): how much each token (third axis) takes of each token (fourth)."""
        q_BHNc, k_BHNc, _ = self._queries_keys_values(x_BNC)
        scores_BHNN = q_BHNc @ k_BHNc.transpose(-2, -1) * q_BHNc.shape[-1] ** -0.5
        bias = self.bias_of(q_BHNc, where)
        if bias is not None:
            scores_BHNN = scores_BHNN + bias
        # In float32: under autocast the rows would sum to 1 to two digits only.
        return scores_BHNN.float().softmax(dim=-1)

    def _queries_keys_values(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_images, num_tokens, width = x_BNC.shape
        qkv = self.qkv(x_BNC).view(num_images, num_tokens, 3, self.num_heads, width // self.num_heads)
        q_BHNc, k_BHNc, v_BHNc = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q_BHNc, k_BHNc, v_BHNc

    def _bias(self, index: Tensor) -> Tensor:
        """(N, N) -> (1, H, N, N), or (B, N, N) -> (B, H, N, N)."""
        assert self.relative_table is not None
        # Selecting columns of the transposed table gives the layout that attention needs, and its
        # backward is three times faster on a CPU than that of indexing rows.
        flat_H = self.relative_table.t().index_select(1, index.flatten())
        bias = flat_H.view(self.num_heads, *index.shape)
        return bias.unsqueeze(0) if index.ndim == 2 else bias.transpose(0, 1)


def _scale(width: int, initial: float | None) -> nn.Parameter | None:
    """Layer scale, a learnt factor per channel of a residual branch; `None` for none."""
    return None if initial is None else nn.Parameter(torch.full((width,), initial))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


class ChannelBlock(nn.Module):
    """`x + droppath(gamma * mlp(norm(x)))`: mixes channels, never positions. Any shape (B, ..., C).

    Args:
        width: C.
        mlp_ratio: hidden width of the MLP over C.
        norm_eps: of the LayerNorm.
        drop_ratio: see `drop_path`.
        layer_scale: initial value of gamma; `None` for none.
    """

    def __init__(
        self,
        width: int,
        mlp_ratio: int,
        *,
        norm_eps: float,
        drop_ratio: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_ratio * width)
        # The released name: `gamma_1` belongs to attention, which this block lacks.
        self.gamma_2 = _scale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C)."""
        branch = _scaled(self.mlp(self.norm(x)), self.gamma_2)
        return x + drop_path(branch, self.drop_ratio, self.training)


class AttentionBlock(nn.Module):
    """A pre-norm transformer block: global attention, then a channel MLP, each on a residual branch.

    Args:
        width: C, divisible by `num_heads`.
        num_heads: H.
        mlp_ratio: hidden width of the MLP over C.
        norm_eps: of both LayerNorms.
        drop_ratio: see `drop_path`; drawn anew for each of the two branches.
        layer_scale: initial value of both gammas; `None` for none (CLIP-supervised iTPN has 0.1).
        relative_grid: see `Attention`.
        qkv_bias: see `Attention`.
        dropout: ratio behind the last layer of the attention and behind both of the MLP.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: int,
        *,
        norm_eps: float,
        drop_ratio: float = 0.0,
        layer_scale: float | None = None,
        relative_grid: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(
            width, num_heads, relative_grid=relative_grid, qkv_bias=qkv_bias, dropout=dropout
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_ratio * width, dropout=dropout)
        self.gamma_1 = _scale(width, layer_scale)
        self.gamma_2 = _scale(width, layer_scale)

    def forward(self, x_BNC: Tensor, where: Places = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `where` as its attention takes it."""
        branch_BNC = _scaled(self.attn(self.norm1(x_BNC), where), self.gamma_1)
        x_BNC = x_BNC + drop_path(branch_BNC, self.drop_ratio, self.training)
        branch_BNC = _scaled(self.mlp(self.norm2(x_BNC)), self.gamma_2)
        return x_BNC + drop_path(branch_BNC, self.drop_ratio, self.training)

    def attention(self, x_BNC: Tensor, where: Places = None) -> Tensor:
        """(B, N, C), the block's input -> (B, H, N, N), the probabilities of its attention."""
        return self.attn.probabilities(self.norm1(x_BNC), where)
