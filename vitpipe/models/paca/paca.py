"""PaCa-ViT: every patch attends to a few clusters of patches, which the network forms itself.

PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers; Ryan Grainger, Thomas Paniagua, Xi Song,
Naresh Cuntoor, Mun Wai Lee, Tianfu Wu; CVPR 2023, arXiv 2203.11987; supplement, figure 7. Where the figure
and the released weights disagree, the weights decide: clusters are formed from normed patches.

    image > stem > [blocks > norm] > transition > [blocks > norm] > ... four stages

Cost grows with N * M, not with N * N. Every image size works: nothing depends on the grid.

Shapes: B images, N patches on a grid in row-major order, C channels, H heads, c = C / H, M clusters.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import attend, drop_path, init_weights
from vitpipe.models.paca.clustering import (
    ClusteringKind,
    Grid,
    as_map,
    as_tokens,
    assigned,
    build_clustering,
)
from vitpipe.models.paca.paca_shapes import STRIDE, Four, PacaShape
from vitpipe.models.paca.teacher import ClusteringTeacher

NORM_EPS = 1e-6  # of all norms in the released networks
_FFN_RATIO = 4


class ClusterAttention(nn.Module):
    """Attention of patches to clusters, or, without clusters, among all patches.

    Args:
        width: C.
        num_heads: H.
        has_clusters: keys and values are those of clusters.
        clustering: this block's own; without it the assignment of an earlier block or of the teacher is used.
    """

    def __init__(
        self, width: int, num_heads: int, *, has_clusters: bool, clustering: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.clustering = clustering
        self.cluster_norm = nn.LayerNorm(width, eps=NORM_EPS) if has_clusters else None
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x_BNC: Tensor, grid: Grid, shares_BMN: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Normed patches -> (B, N, C), and the assignment that was used."""
        shares_BMN = self.shares(x_BNC, grid, shares_BMN)
        q_BHNc, k_BHMc, v_BHMc = self._queries_keys_values(x_BNC, shares_BMN)
        out_BNC = attend(q_BHNc, k_BHMc, v_BHMc).transpose(1, 2).flatten(2)
        return self.proj(out_BNC), shares_BMN

    def shares(self, x_BNC: Tensor, grid: Grid, given_BMN: Tensor | None) -> Tensor | None:
        """The assignment: of this block's clustering, or the given one; `None` without clusters."""
        if self.clustering is not None:
            return assigned(self.clustering(x_BNC, grid))
        return given_BMN

    def probabilities(self, x_BNC: Tensor, shares_BMN: Tensor | None) -> Tensor:
        """How much each patch takes of each cluster, (B, H, N, M); of each patch without clusters."""
        q_BHNc, k_BHMc, _ = self._queries_keys_values(x_BNC, shares_BMN)
        scores = q_BHNc @ k_BHMc.transpose(-2, -1) * q_BHNc.shape[-1] ** -0.5
        return scores.float().softmax(dim=-1)

    def _queries_keys_values(self, x_BNC: Tensor, shares_BMN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        source = x_BNC
        if self.cluster_norm is not None:
            assert shares_BMN is not None
            source = self.cluster_norm(shares_BMN.to(x_BNC.dtype) @ x_BNC)
        q, k, v = self.q(x_BNC), self.k(source), self.v(source)
        heads = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v)]
        return heads[0], heads[1], heads[2]


class ConvFfn(nn.Module):
    """Linear, a depthwise 3 x 3 convolution with its own shortcut, GELU, linear.

    The convolution with the shortcut is the network's only knowledge of positions.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _FFN_RATIO * width
        self.fc1 = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        u_BND = self.fc1(x_BNC)
        v_BND = u_BND + as_tokens(self.depthwise(as_map(u_BND, grid)))
        return self.fc2(F.gelu(v_BND))


class PacaBlock(nn.Module):
    """`x + attention(norm x)`, then `x + ffn(norm x)`; one drop ratio for both, drawn separately."""

    def __init__(self, width: int, attn: ClusterAttention, drop_ratio: float) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ConvFfn(width)

    def forward(self, x_BNC: Tensor, grid: Grid, shares: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches and the assignment of the blocks before -> patches and the assignment of this one."""
        out_BNC, shares = self.attn(self.norm1(x_BNC), grid, shares)
        x_BNC = x_BNC + drop_path(out_BNC, self.drop_ratio, self.training)
        return x_BNC + drop_path(self.mlp(self.norm2(x_BNC), grid), self.drop_ratio, self.training), shares


class Halving(nn.Module):
    """A 3 x 3 convolution of stride 2 and a norm over channels: tokens of half the rows and columns."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_width, eps=NORM_EPS)

    def forward(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) -> (B, N', C') and its grid, sides rounded up."""
        out_BCHW = self.conv(as_map(x_BNC, grid))
        return self.norm(as_tokens(out_BCHW)), (out_BCHW.shape[2], out_BCHW.shape[3])


class Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between them, and a norm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, H, W) -> tokens (B, N, C) at stride 4, and their grid."""
        out_BCHW = self.conv2(self.conv1(images_BCHW))
        return self.norm(as_tokens(out_BCHW)), (out_BCHW.shape[2], out_BCHW.shape[3])


class StageOutput(NamedTuple):
    """A stage's result: normed tokens (B, N, C), their grid, the assignments of its last and first block."""

    tokens: Tensor
    grid: Grid
    shares: Tensor | None
    first_shares: Tensor | None


@dataclass
class PacaOutputs:
    """What `PaCa` computes.

    Attributes:
        stages: of the four stages.
        tokens: block number -> what the block puts out, before the stage's norm.
        attention: block number -> probabilities, see `ClusterAttention.probabilities`.
        grids: block number -> the grid of its patches.
    """

    stages: list[StageOutput] = field(default_factory=list)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    grids: dict[int, Grid] = field(default_factory=dict)


class PaCa(nn.Module):
    """The network without a head.

    Args:
        shape: widths, depths, heads.
        clusters: M of each stage; the shape's if not given.
        kind: what assigns patches; a shape with a teacher has none of these.
        by_block: every block assigns anew; otherwise the first of a stage does for all.
        drop_ratio: of the last block; it rises linearly from 0 in the first.

    Raises:
        InputError: a teacher and a stage without clusters.
    """

    def __init__(
        self,
        shape: PacaShape,
        *,
        clusters: Four | None = None,
        kind: ClusteringKind = "conv",
        by_block: bool = False,
        drop_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.clusters = shape, clusters or shape.clusters
        widths, depths = shape.widths, shape.depths
        if shape.teacher_depths is not None and 0 in self.clusters:
            raise InputError(
                f"{shape.name} assigns the patches of every stage, and clusters are {list(self.clusters)}",
                where="model.clusters",
                fix="give every stage at least one cluster",
            )
        self.stem = Stem(widths[0])
        self.teacher: ClusteringTeacher | None = None
        if shape.teacher_depths is not None:
            self.teacher = ClusteringTeacher(widths, shape.teacher_depths, self.clusters)
        rates = iter(drop_ratio * i / max(1, shape.num_blocks - 1) for i in range(shape.num_blocks))

        def block(stage: int, number: int) -> PacaBlock:
            width, num_clusters = widths[stage], self.clusters[stage]
            owns = num_clusters > 0 and self.teacher is None and (by_block or number == 0)
            clustering = build_clustering(kind, width, num_clusters) if owns else None
            attention = ClusterAttention(
                width, shape.heads[stage], has_clusters=num_clusters > 0, clustering=clustering
            )
            return PacaBlock(width, attention, next(rates))

        self.stages = nn.ModuleList(
            nn.ModuleList(block(stage, number) for number in range(depth))
            for stage, depth in enumerate(depths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=NORM_EPS) for width in widths)
        self.transitions = nn.ModuleList(map(Halving, widths, widths[1:]))
        self._init_weights()

    def _init_weights(self) -> None:
        init_weights(self, self.shape.init_gain)
        for module in self.modules():
            # On the meta device, where nothing is drawn, PyTorch would import torch._dynamo for it: 3 s.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                rows, columns = module.kernel_size
                fan_out = rows * columns * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, images_BCHW: Tensor, blocks: Collection[int] = (), *, attention: bool = False
    ) -> PacaOutputs:
        """(B, 3, H, W) -> the stages, and tokens of some blocks, numbered from 0 through all stages.

        Raises:
            InputError: when a side is below 32 pixels.
        """
        if min(images_BCHW.shape[-2:]) < STRIDE:
            height, width = images_BCHW.shape[-2:]
            raise InputError(
                f"{self.shape.name} cannot take an image of {height} x {width} pixels",
                where="image_size, and sizes of crops",
                fix=f"use sides of at least {STRIDE} pixels",
            )
        found, number = PacaOutputs(), 0
        x_BNC, grid = self.stem(images_BCHW)
        taught = None if self.teacher is None else self.teacher(as_map(x_BNC, grid))
        for stage, (members, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            shares = first = None if taught is None else taught.assignments[stage]
            assert isinstance(members, nn.ModuleList)
            for block in members:
                assert isinstance(block, PacaBlock)
                before = x_BNC
                x_BNC, shares = block(before, grid, shares)
                first = shares if block is members[0] else first
                if number in blocks:
                    found.tokens[number], found.grids[number] = x_BNC, grid
                    if attention:
                        found.attention[number] = block.attn.probabilities(block.norm1(before), shares)
                number += 1
            if taught is not None:
                x_BNC = x_BNC + taught.side_tokens[stage]
            x_BNC = norm(x_BNC)
            found.stages.append(StageOutput(x_BNC, grid, shares, first))
            if stage < len(self.transitions):
                x_BNC, grid = self.transitions[stage](x_BNC, grid)
        return found

    @torch.no_grad()
    def assignment(self, images_BCHW: Tensor, stage: int) -> tuple[Tensor, Grid]:
        """The assignment of a stage's first block, (B, M, N), and its grid, for pictures.

        Args:
            images_BCHW: normalised.
            stage: from 1.

        Raises:
            InputError: when the stage has no clusters.
        """
        output = self(images_BCHW).stages[stage - 1]
        if output.first_shares is None:
            raise InputError(
                f"Stage {stage} of {self.shape.name} has no clusters",
                where="stage",
                fix=f"choose one of {[i + 1 for i, m in enumerate(self.clusters) if m]}",
            )
        return output.first_shares, output.grid
