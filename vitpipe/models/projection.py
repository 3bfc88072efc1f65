"""Heads of self-supervised pre-training, behind an encoder's vectors.

DINO's head: Emerging Properties in Self-Supervised Vision Transformers; Mathilde Caron et al.; arXiv
2104.14294, appendix C. MoBY's projector and predictor: Self-Supervised Learning with Swin Transformers;
Zhenda Xie et al.; arXiv 2105.04553, section 3.

Shapes: R rows (images, crops or patches), C channels, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import init_weights

_LENGTH_EPS = 1e-12


class Prototypes(nn.Module):
    """Linear layer without bias whose K rows have a direction and, apart from it, a length.

    Args:
        width: of the input.
        num_prototypes: K.
        trains_length: the lengths are trained; they stay 1 otherwise.
    """

    def __init__(self, width: int, num_prototypes: int, *, trains_length: bool) -> None:
        super().__init__()
        # Names and shapes are those of torch's older weight norm, which released checkpoints have.
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trains_length)
        self.weight_v = nn.Parameter(nn.Linear(width, num_prototypes, bias=False).weight.detach().clone())

    def forward(self, x_RC: Tensor) -> Tensor:
        """(R, C) -> (R, K)."""
        scale_K1 = self.weight_g / torch.linalg.vector_norm(self.weight_v.float(), dim=1, keepdim=True)
        # The lengths go into the smaller of the two: of a few images the outputs, (R, K), of thousands of
        # patches the weights, (K, C). Either costs passes over that tensor, forward and backward.
        if len(x_RC) > x_RC.shape[1]:
            return F.linear(x_RC, self.weight_v * scale_K1)
        return F.linear(x_RC, self.weight_v) * scale_K1.squeeze(1)


class DinoHead(nn.Module):
    """Three linear layers with GELU between them > length 1 > prototypes.

    Args:
        width: C.
        num_prototypes: K.
        hidden: width of the two layers in between.
        bottleneck: width in front of the prototypes.
        trains_length: see `Prototypes`.
    """

    def __init__(
        self,
        width: int,
        num_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        trains_length: bool = False,
        init_gain: float | None = None,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        init_weights(self.mlp, init_gain)
        self.last_layer = Prototypes(bottleneck, num_prototypes, trains_length=trains_length)

    def forward(self, x_RC: Tensor) -> Tensor:
        """(R, C) -> logits (R, K)."""
        bottleneck = F.normalize(self.mlp(x_RC).float(), dim=-1, eps=_LENGTH_EPS)
        logits_RK: Tensor = self.last_layer(bottleneck)
        return logits_RK


class _SummedOverRanks(torch.autograd.Function):
    """Sum over all ranks; every rank's loss depends on every rank's rows, so the gradient is a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all ranks together, on CPUs too, where torch's own refuses to work."""

    def forward(self, x_RC: Tensor) -> Tensor:
        """(R, C) -> (R, C); in training every rank has to call it, with R of its own."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            if self.training and len(x_RC) < 2:
                raise InputError(
                    "Batch norm in the projector needs at least two images in a micro-batch",
                    where="micro_batch, global_batch",
                    fix="give 2 or more, or leave micro_batch at auto",
                )
            return super().forward(x_RC)
        rows = x_RC.float()
        num_rows = torch.full((1,), float(len(rows)), device=rows.device)
        sums: Tensor = _SummedOverRanks.apply(torch.cat([rows.sum(0), rows.square().sum(0), num_rows]))
        total, total_squares, count = sums.split([self.num_features, self.num_features, 1])
        mean, count = total / count, count.detach()
        variance = (total_squares / count - mean.square()).clamp(min=0.0)
        self._count(mean.detach(), variance.detach(), float(count))
        normed = (rows - mean) * torch.rsqrt(variance + self.eps)
        return (normed * self.weight + self.bias).to(x_RC.dtype)

    @torch.no_grad()
    def _count(self, mean: Tensor, variance: Tensor, num_rows: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        # The running variance is the unbiased one, as torch's own batch norm keeps it.
        unbiased = variance * num_rows / max(1.0, num_rows - 1.0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1


class MobyMlp(nn.Module):
    """MoBY's projector and predictor: Linear > batch norm > ReLU > Linear, (R, C) -> (R, out)."""

    def __init__(self, width: int, *, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.linear_hidden = nn.Sequential(nn.Linear(width, hidden), SharedBatchNorm(hidden), nn.ReLU())
        self.linear_out = nn.Linear(hidden, out)

    def forward(self, x_RC: Tensor) -> Tensor:
        """(R, C) -> (R, out)."""
        out: Tensor = self.linear_out(self.linear_hidden(x_RC))
        return out
