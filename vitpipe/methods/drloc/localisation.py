"""The localisation loss: positions > embeddings of pairs > MLP > loss on their offsets.

Efficient Training of Visual Transformers with Small Datasets; Yahui Liu et al.; NeurIPS 2021; supplement,
sections 1, 2 and 6. Where the released code differs, the paper is followed.

Shapes: B images, a grid of R rows and C columns (G: (R, C)) of D channels, M pairs of cells per image. The
first of two coordinates, axes or outputs is always that of rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.methods.drloc.config import LossKind, Pooling
from vitpipe.models.draws import uniform

REG_ALPHA = 0.001
"""Weight of the variance term of loss `reg`; supplement, section 2."""
# Of a certain prediction the variance is 0; the released code adds the same.
_LEAST_VARIANCE = 1e-8

Grid = tuple[int, int]
_Offset = TypeVar("_Offset", float, Tensor)


class Pairs(NamedTuple):
    """Positions of M pairs of cells per image, int64 (B, M, 2) each: row and column, from 0."""

    first_BM2: Tensor  # noqa: N815
    second_BM2: Tensor  # noqa: N815

    @property
    def offsets_BM2(self) -> Tensor:  # noqa: N802
        """First minus second position, int64 (B, M, 2)."""
        return self.first_BM2 - self.second_BM2


def draw_pairs(key: int, indices_B: Tensor, num_pairs: int, grid: Grid) -> Pairs:
    """Independent uniform positions, with replacement; functions of key and image, see `models.draws`.

    Args:
        key: 64 bits.
        indices_B: numbers of the images in their set.
        num_pairs: M.
        grid: rows and columns.
    """
    # In float64 the product with a side is exact, and so below it.
    numbers_BN = uniform(key, indices_B, 4 * num_pairs).double()
    sides_2 = torch.tensor(grid, dtype=torch.float64, device=numbers_BN.device)
    first_BM2, second_BM2 = (numbers_BN.unflatten(1, (2, num_pairs, 2)) * sides_2).long().unbind(1)
    return Pairs(first_BM2, second_BM2)


def pooled(map_BDRC: Tensor, pooling: Pooling) -> Tensor:
    """(B, D, R, C) -> the coarser grid that the loss reads, see `config.pooled_grid`."""
    if pooling == "2x2":
        return F.avg_pool2d(map_BDRC, 2)
    if pooling == "3x3":
        return F.avg_pool2d(map_BDRC, 3, stride=2, padding=1, count_include_pad=False)
    return map_BDRC


def pair_embeddings(map_BDRC: Tensor, pairs: Pairs) -> Tensor:
    """The embeddings of both positions one behind the other, (B, M, 2 * D)."""
    num_columns = map_BDRC.shape[3]
    cells_BND = map_BDRC.flatten(2).transpose(1, 2)
    image_B1 = torch.arange(len(cells_BND), device=cells_BND.device).unsqueeze(1)
    # By the width: the paper's pseudo-code multiplies by the height, the same for its square grids only.
    return torch.cat(
        [cells_BND[image_B1, at[..., 0] * num_columns + at[..., 1]] for at in pairs],
        dim=2,
    )


class LocationMLP(nn.Module):
    """Two embeddings > three linear layers with ReLU between them > an output per axis (table 15).

    Args:
        width: D.
        hidden_width: of the two inner layers.
        classes: outputs of each axis for losses `ce` and `reg`, in two parallel last layers; `None` for one
            last layer with one output per axis.
        trunc_normal: initial weights of deviation 0.02 and zero biases, instead of PyTorch's.
    """

    def __init__(
        self, width: int, hidden_width: int, classes: tuple[int, int] | None = None, *, trunc_normal: bool
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * width, hidden_width), nn.ReLU(), nn.Linear(hidden_width, hidden_width), nn.ReLU()
        )
        if classes is None:
            self.layers.append(nn.Linear(hidden_width, 2))
        self.has_classes = classes is not None
        self.unshared = nn.ModuleList(nn.Linear(hidden_width, number) for number in classes or ())
        for module in self.modules():
            if trunc_normal and isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pairs_BME: Tensor) -> tuple[Tensor, ...]:
        """(B, M, 2 * D) -> the outputs of rows and of columns: (B, M), or (B, M, classes), each."""
        found = self.layers(pairs_BME)
        return tuple(head(found) for head in self.unshared) if self.has_classes else found.unbind(-1)


def num_offset_classes(grid: Grid) -> tuple[int, int]:
    """2k + 1 for each side k: the offsets -k ... k, of which -k and k do not occur (equations 4 and 5)."""
    return 2 * grid[0] + 1, 2 * grid[1] + 1


def location_loss(
    kind: LossKind, outputs: Sequence[Tensor], offsets_BM2: Tensor, grid: Grid, *, raw_targets: bool = False
) -> Tensor:
    """The loss of one grid, a mean over images and pairs, a scalar in at least float32.

    Absolute errors (`drloc`, `signed`, `all`) are the mean of both axes, as in the paper's pseudo-code;
    losses on classes (`ce`, `reg`) their sum.

    Args:
        kind: `drloc` and `all` have absolute offsets as targets.
        outputs: of `LocationMLP`.
        offsets_BM2: of `Pairs`.
        grid: rows and columns.
        raw_targets: see `DrlocConfig`.
    """
    axes = []
    for axis, (output, side) in enumerate(zip(outputs, grid, strict=True)):
        # float32 under autocast, too: bfloat16 has 8 bits, and 0.192 is compared with 0.19.
        output = output if output.dtype == torch.float64 else output.float()
        offset_BM = offsets_BM2[..., axis]
        if kind == "ce":
            axes.append(F.cross_entropy(output.flatten(0, 1), (offset_BM + side).flatten()))
        elif kind == "reg":
            axes.append(_gaussian_loss(output, offset_BM, side).mean())
        else:
            target_BM = _target(kind, offset_BM, side, raw_targets=raw_targets)
            axes.append((output - target_BM).abs().mean())
    total = torch.stack(axes).sum()
    return total if kind in ("ce", "reg") else total / 2


def equation_factor(kind: LossKind, num_images: int) -> int:
    """The paper's equations in units of `location_loss`: they sum over the images of a batch and the axes."""
    return num_images if kind in ("ce", "reg") else 2 * num_images


def trivial_loss(kind: LossKind, grid: Grid, *, raw_targets: bool = False) -> float:
    """`location_loss` of the best prediction that is the same for all pairs: it takes no learning.

    66/343 = 0.1924 for `drloc` on 7 x 7 cells. Of `reg` it is a prediction as broad as there is, whose
    variance term costs less than its distance gains.
    """
    found = 0.0
    for side in grid:
        counts = Counter(i - p for i in range(side) for p in range(side))
        share = {offset: number / side**2 for offset, number in counts.items()}
        if kind == "ce":
            found -= sum(p * math.log(p) for p in share.values())
        elif kind == "reg":
            spread = sum(p * offset**2 for offset, p in share.items())
            # spread / s + alpha / 2 * log(s) is least at 2 * spread / alpha, and s is at most side^2.
            variance = min(2 * spread / REG_ALPHA, float(side**2)) + _LEAST_VARIANCE
            found += spread / variance + 0.5 * REG_ALPHA * math.log(variance)
        else:
            targets = {o: _target(kind, float(o), side, raw_targets=raw_targets) for o in share}
            # The best constant is a median, which is one of the targets.
            found += (
                min(sum(p * abs(targets[o] - guess) for o, p in share.items()) for guess in targets.values())
                / 2
            )
    return found


def _target(kind: LossKind, offset: _Offset, side: int, *, raw_targets: bool) -> _Offset:
    """What an output is compared with: in units of the side, or as the released code has it."""
    if kind == "signed":
        return offset + (side - 1) if raw_targets else offset / side
    return abs(offset) if raw_targets else abs(offset) / side


def _gaussian_loss(logits_BMK: Tensor, offset_BM: Tensor, side: int) -> Tensor:
    """Equation 6, (B, M): squared distance to the mean in variances, and the logarithm of the deviation."""
    share_BMK = logits_BMK.softmax(-1)
    class_K = torch.arange(-side, side + 1, device=logits_BMK.device, dtype=logits_BMK.dtype)
    mean_BM = (share_BMK * class_K).sum(-1)
    distance_BMK = class_K - mean_BM.unsqueeze(-1)
    variance_BM = (share_BMK * distance_BMK.square()).sum(-1) + _LEAST_VARIANCE
    return (offset_BM - mean_BM).square() / variance_BM + 0.5 * REG_ALPHA * variance_BM.log()
