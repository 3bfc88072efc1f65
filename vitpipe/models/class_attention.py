"""A token that looks at patches: SelfPatch's aggregation module, two class-attention blocks and a norm.

Patch-level Representation Learning for Self-supervised Vision Transformers; Sukmin Yun et al.; CVPR 2022,
supplement, section A: class attention as in CaiT (Touvron et al., arXiv 2103.17239, figure 3) without
LayerScale. The token looks at the patches and at itself; the patches stay as they are.

Shapes: B images, N patches, C channels, H heads, c = C / H, k chosen patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import Mlp, init_weights

_NORM_EPS = 1e-6
_MLP_RATIO = 4


class ClassAttentionBlock(nn.Module):
    """`a + attention(a; a and patches)`, then `a + mlp(a)`, both on normed input; only a changes."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(
                f"{width} channels cannot be shared among {num_heads} heads of class attention",
                where="model.heads, or the method's aggregation_heads",
                fix=f"give a divisor of {width}",
            )
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        # Three layers, as in the released weights: queries are needed of one token only.
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = Mlp(width, _MLP_RATIO * width)

    def forward(self, token_BMC: Tensor, patches_BNC: Tensor, chosen_BMk: Tensor | None = None) -> Tensor:
        """M tokens per image after their look at the patches: (B, M, C).

        Args:
            token_BMC: M = 1, or one for each patch; of one image (1, 1, C) where all are the same.
            patches_BNC: what they look at.
            chosen_BMk: the patches that each token sees, (B, M, k); all of them without it.
        """
        seen_BMC = self._attended(token_BMC, patches_BNC, chosen_BMk)
        token_BMC = token_BMC + self.proj(seen_BMC)
        return token_BMC + self.mlp(self.norm2(token_BMC))

    def shares(self, token_BMC: Tensor, patches_BNC: Tensor) -> Tensor:
        """Attention of one token per image to itself and the patches: (B, H, 1, 1 + N)."""
        q_BHMc, own_BHM, k_BHNc = self._scores(self.norm1(token_BMC), self.norm1(patches_BNC))
        scores_BHMN = q_BHMc @ k_BHNc.transpose(-2, -1)
        own = own_BHM.unsqueeze(-1).expand(*scores_BHMN.shape[:-1], 1)
        return torch.cat([own, scores_BHMN], dim=-1).float().softmax(dim=-1)

    def _attended(self, token_BMC: Tensor, patches_BNC: Tensor, chosen_BMk: Tensor | None) -> Tensor:
        # Norm, keys and values work on each patch alone: once per patch, and not once per patch and token
        # that sees it. So many tokens with few patches each cost little more than one.
        token, patches = self.norm1(token_BMC), self.norm1(patches_BNC)
        q_BHMc, own_BHM, k_BHNc = self._scores(token, patches)
        own_v_BHMc, v_BHNc = self._split(self.v(token)), self._split(self.v(patches))
        if chosen_BMk is None:
            scores_BHMN = q_BHMc @ k_BHNc.transpose(-2, -1)
            own = own_BHM.unsqueeze(-1).expand(*scores_BHMN.shape[:-1], 1)
            share = torch.cat([own, scores_BHMN], dim=-1).softmax(dim=-1)
            seen_BHMc = share[..., 1:] @ v_BHNc
        else:
            scores_BHMk = self._chosen_scores(q_BHMc, k_BHNc, chosen_BMk)
            own = own_BHM.unsqueeze(-1).expand(*scores_BHMk.shape[:-1], 1)
            share = torch.cat([own, scores_BHMk], dim=-1).softmax(dim=-1)
            seen_BHMc = _weighted(share[..., 1:], v_BHNc, chosen_BMk)
        seen_BHMc = seen_BHMc + share[..., :1] * own_v_BHMc
        return seen_BHMc.transpose(1, 2).flatten(2)

    def _scores(self, token: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries (B, H, M, c), the tokens' scores with themselves (B, H, M), keys (B, H, N, c)."""
        q_BHMc = self._split(self.q(token))
        q_BHMc = q_BHMc * q_BHMc.shape[-1] ** -0.5
        own_BHM = (q_BHMc * self._split(self.k(token))).sum(-1)
        return q_BHMc, own_BHM, self._split(self.k(patches))

    def _split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _chosen_scores(self, q_BHMc: Tensor, k_BHNc: Tensor, chosen_BMk: Tensor) -> Tensor:
        """Scores of each token with its own patches: (B, H, M, k)."""
        if q_BHMc.shape[2] == 1:  # the same query for all: each patch has one score, whoever sees it
            scores_BHN = (k_BHNc @ q_BHMc.transpose(-2, -1)).squeeze(-1)
            return _rows(scores_BHN.unsqueeze(-1), chosen_BMk).squeeze(-1)
        # One patch of all tokens at a time: k times less memory than all at once.
        parts = [
            (q_BHMc * _rows(k_BHNc, one_BM.unsqueeze(-1)).squeeze(3)).sum(-1)
            for one_BM in chosen_BMk.unbind(2)
        ]
        return torch.stack(parts, dim=-1)


def _rows(x_BHNc: Tensor, chosen_BMk: Tensor) -> Tensor:
    """Chosen rows: (B, H, M, k, c)."""
    num_images, num_tokens, k = chosen_BMk.shape
    index = chosen_BMk.reshape(num_images, 1, num_tokens * k, 1)
    index = index.expand(-1, x_BHNc.shape[1], -1, x_BHNc.shape[3])
    return x_BHNc.gather(2, index).unflatten(2, (num_tokens, k))


def _weighted(share_BHMk: Tensor, v_BHNc: Tensor, chosen_BMk: Tensor) -> Tensor:
    """Sum of the chosen values by their shares: (B, H, M, c)."""
    total: Tensor | None = None
    for number, one_BM in enumerate(chosen_BMk.unbind(2)):
        part = share_BHMk[..., number : number + 1] * _rows(v_BHNc, one_BM.unsqueeze(-1)).squeeze(3)
        total = part if total is None else total + part
    assert total is not None
    return total


class ClassAttention(nn.Module):
    """The aggregation module: a learnt token, two blocks, a norm.

    Args:
        width: C.
        num_heads: H.
    """

    def __init__(self, width: int, num_heads: int, *, init_gain: float | None = None) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(ClassAttentionBlock(width, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        init_weights(self, init_gain)
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, patches_BNC: Tensor) -> Tensor:
        """(B, N, C) -> one vector per image, (B, C)."""
        token_BMC = self.token.expand(len(patches_BNC), -1, -1)
        for block in self.blocks:
            token_BMC = block(token_BMC, patches_BNC)
        return self.norm(token_BMC).squeeze(1)

    def around(self, patches_BNC: Tensor, chosen_BNk: Tensor) -> Tensor:
        """One vector per patch, made of its chosen patches, not of itself: (B, N, C).

        Args:
            chosen_BNk: positions, see `nearest_neighbours`.
        """
        token: Tensor = self.token
        for block in self.blocks:
            token = block(token, patches_BNC, chosen_BNk)
        return self.norm(token)

    def attention(self, patches_BNC: Tensor) -> Tensor:
        """Attention of the first block's token to itself and the patches: (B, H, 1, 1 + N)."""
        first = self.blocks[0]
        assert isinstance(first, ClassAttentionBlock)
        return first.shares(self.token, patches_BNC)
