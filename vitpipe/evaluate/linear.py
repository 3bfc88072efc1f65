"""Linear classification on frozen, cached features.

The protocol of MAE (He et al., arXiv 2111.06377, appendix A.1, after Doersch et al.): features standardised
per channel as by a BatchNorm without affine parameters, a linear layer started at std 0.01, momentum 0.9, no
weight decay, cosine schedule, learning rate per 256 images. Two differences, both because features are
computed once: every image is seen in its centre crop only, and plain SGD stands in for LARS, which is
there for batches of 16384.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.contracts.seeds import seed_of
from vitpipe.optim.schedules import learning_rate

_MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProbe:
    """A trained probe: (x - mean) / std @ weight^T + bias; mean and std (C,), weight (K, C), bias (K,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features_NC: Tensor) -> Tensor:
        """(N, C) -> (N, K)."""
        return F.linear((features_NC - self.mean) / self.std, self.weight, self.bias)


def train_linear(
    features_MC: Tensor,
    labels_M: Tensor,
    *,
    num_classes: int,
    epochs: int,
    batch: int,
    base_lr: float,
    seed: int,
) -> LinearProbe:
    """Train a probe where the features are; the same arguments give the same bits on the same machine.

    Args:
        batch: images per step; the whole set if it is smaller.
        base_lr: per 256 images.
    """
    num_images, width = features_MC.shape
    batch = min(batch, num_images)
    generator = torch.Generator().manual_seed(seed_of("linear probe", seed))
    std_C, mean_C = torch.std_mean(features_MC, dim=0, correction=0)
    std_C = (std_C.square() + 1e-6).sqrt()
    standard_MC = (features_MC - mean_C) / std_C
    weight = (torch.randn(num_classes, width, generator=generator) * 0.01).to(features_MC.device)
    bias = torch.zeros(num_classes, device=features_MC.device)
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.SGD([weight, bias], lr=0.0, momentum=_MOMENTUM)
    steps_per_epoch = num_images // batch
    num_steps = epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order_M = torch.randperm(num_images, generator=generator)
        first = step % steps_per_epoch * batch
        chosen = order_M[first : first + batch]
        peak_lr = base_lr * batch / 256
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step, num_steps=num_steps, warmup_steps=0, peak_lr=peak_lr, min_lr=0.0
            )
        loss = F.cross_entropy(F.linear(standard_MC[chosen], weight, bias), labels_M[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return LinearProbe(mean_C, std_C, weight.detach(), bias.detach())
