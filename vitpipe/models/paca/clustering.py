"""What assigns patches to clusters: a score of every patch for every cluster.

Grainger et al., PaCa-ViT (CVPR 2023), supplement, figure 7. The softmax that follows is over the patches of a
cluster, not over the clusters of a patch (`assigned`).

Shapes: B images, N patches on a grid in row-major order, C channels, M clusters.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

ClusteringKind = Literal["conv", "mlp", "linear"]
_KERNEL = 7
_MLP_RATIO = 4
Grid = tuple[int, int]


def as_map(x_BNC: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, rows, columns); a view, channels last in memory."""
    # By way of one long dimension, which gives the images' dimension its usual stride. Of a single image it
    # is arbitrary otherwise, and convolutions, which read the layout from it, copied every map twice: 1.6
    # times the time of a training step on one image of 896 pixels.
    return x_BNC.reshape(-1, x_BNC.shape[-1]).unflatten(0, (len(x_BNC), *grid)).permute(0, 3, 1, 2)


def as_tokens(x_BCHW: Tensor) -> Tensor:
    """A map (B, C, rows, columns) as tokens (B, N, C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def assigned(scores_BMN: Tensor) -> Tensor:
    """Scores -> shares of the patches in each cluster, (B, M, N); every cluster's shares sum to 1."""
    return scores_BMN.softmax(dim=-1)


class ConvClustering(nn.Module):
    """Depthwise 7 x 7, GELU, 1 x 1, GELU, 1 x 1 without bias."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.to_clusters = nn.Conv2d(width, num_clusters, 1, bias=False)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> scores (B, M, N)."""
        x_BCHW = F.gelu(self.depthwise(as_map(x_BNC, grid)))
        scores: Tensor = self.to_clusters(F.gelu(self.pointwise(x_BCHW))).flatten(2)
        return scores


class MlpClustering(nn.Module):
    """Linear, GELU, linear, patch by patch."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, _MLP_RATIO * width)
        self.to_clusters = nn.Linear(_MLP_RATIO * width, num_clusters)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> scores (B, M, N)."""
        scores: Tensor = self.to_clusters(F.gelu(self.hidden(x_BNC))).transpose(1, 2)
        return scores


class LinearClustering(nn.Module):
    """One linear map without bias, patch by patch. In the released code, and in no published row."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.to_clusters = nn.Linear(width, num_clusters, bias=False)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> scores (B, M, N)."""
        scores: Tensor = self.to_clusters(x_BNC).transpose(1, 2)
        return scores


_KINDS: dict[str, type[nn.Module]] = {
    "conv": ConvClustering,
    "mlp": MlpClustering,
    "linear": LinearClustering,
}


def build_clustering(kind: ClusteringKind, width: int, num_clusters: int) -> nn.Module:
    """The module of a kind."""
    return _KINDS[kind](width, num_clusters)
