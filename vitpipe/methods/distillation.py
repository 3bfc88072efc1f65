"""What a student learns from a teacher's outputs: cross entropy between sharpened distributions.

Emerging Properties in Self-Supervised Vision Transformers; Mathilde Caron et al.; arXiv 2104.14294,
section 3.1: the teacher's outputs are centred by their running mean and divided by a low temperature.

Shapes: R rows, K prototypes, V crops, B images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitpipe.train.ranks import Ranks

_ROWS = 4096  # at a time, for the buffers in float32


def cross_entropy(student_RK: Tensor, target_RK: Tensor, temperature: float) -> Tensor:
    """`- sum_k target_k log softmax(student / temperature)_k` of every row: (R,) float32.

    Args:
        student_RK: logits.
        target_RK: without gradient; a row may sum to any mass, for example 2 for two teachers.
        temperature: of the student.
    """
    loss_R: Tensor = _CrossEntropy.apply(student_RK, target_RK, temperature)
    return loss_R


class _CrossEntropy(torch.autograd.Function):
    """Keeps logits and targets only: torch's own functions keep and make four more tensors of that size."""

    @staticmethod
    def forward(ctx: Any, student_RK: Tensor, target_RK: Tensor, temperature: float) -> Tensor:
        parts, normalisers = [], []
        for student, target in zip(student_RK.split(_ROWS), target_RK.split(_ROWS), strict=True):
            scaled, target = student.float() / temperature, target.float()
            normaliser = scaled.logsumexp(dim=-1)
            parts.append(target.sum(-1) * normaliser - torch.linalg.vecdot(target, scaled))
            normalisers.append(normaliser)
        ctx.save_for_backward(student_RK, target_RK, torch.cat(normalisers))
        ctx.temperature = temperature
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        student_RK, target_RK, normaliser_R = ctx.saved_tensors
        gradient_RK = torch.empty_like(student_RK)
        rows = zip(
            student_RK.split(_ROWS), target_RK.split(_ROWS), normaliser_R.split(_ROWS), grad_R.split(_ROWS),
            gradient_RK.split(_ROWS), strict=True,
        )  # fmt: skip
        for student, target, normaliser, grad, gradient in rows:
            target = target.float()
            found = (student.float() / ctx.temperature).sub_(normaliser.unsqueeze(1)).exp_()
            found = found.mul_(target.sum(-1, keepdim=True)).sub_(target)
            gradient.copy_(found.mul_((grad / ctx.temperature).unsqueeze(1)))
        return gradient_RK, None, None


def across_views(student_VBK: Tensor, target_GBK: Tensor, temperature: float) -> Tensor:
    """DINO's loss: every crop of the student against the global crops of the teacher other than itself.

    Args:
        student_VBK: logits, the G global crops first.
        target_GBK: the teacher's distributions.
    """
    num_crops, num_global = len(student_VBK), len(target_GBK)
    both = target_GBK.sum(0)
    # A crop's targets are added up before the loss: the student's distribution is computed once for both.
    targets = [both - target_GBK[v] if v < num_global else both for v in range(num_crops)]
    loss_R = cross_entropy(student_VBK.flatten(0, 1), torch.stack(targets).flatten(0, 1), temperature)
    # G (V - 1) pairs, each a mean over the images.
    return loss_R.sum() / (num_global * (num_crops - 1) * student_VBK.shape[1])


class Centre(nn.Module):
    """Running mean of a teacher's outputs, over all rows of all micro-batches and ranks of a step.

    Args:
        num_prototypes: K.
        momentum: share of the old value.
    """

    value: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes))
        self._sums: list[Tensor] = []

    def targets(self, teacher_RK: Tensor, temperature: float) -> Tensor:
        """The teacher's distributions (R, K): `softmax((teacher - centre) / temperature)`, float32."""
        return (teacher_RK.float() - self.value).div_(temperature).softmax(dim=-1)

    @torch.no_grad()
    def add(self, teacher_RK: Tensor) -> None:
        """Count the rows of a micro-batch for the next `update`."""
        rows = torch.full((1,), float(len(teacher_RK)), device=teacher_RK.device)
        self._sums.append(torch.cat([teacher_RK.float().sum(0), rows]))

    @torch.no_grad()
    def update(self, ranks: Ranks) -> None:
        """Move towards the mean of the rows since the last call; every rank calls it after a step."""
        # Summed over the micro-batches in the order of their images, however ranks share them (data.order).
        sums = in_image_order(torch.stack(self._sums), ranks).sum(0)
        self._sums.clear()
        self.value.lerp_(sums[:-1] / sums[-1], 1.0 - self.momentum)


def in_image_order(micro_batches: Tensor, ranks: Ranks) -> Tensor:
    """What M micro-batches of each rank gave, (M, ...) > (M * num_ranks, ...), in image order."""
    # Micro-batch m of rank r is number m * num_ranks + r of the step, see `data.order.train_chunks`.
    return ranks.gather(micro_batches).transpose(0, 1).flatten(0, 1)
