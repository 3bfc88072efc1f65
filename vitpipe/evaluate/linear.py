"""Linear classification on frozen, cached features.

The protocol of MAE (He et al., arXiv 2111.06377, appendix A.1, after Doersch et al.): features standardised
per channel as by a BatchNorm without affine parameters, a linear layer initialised with std 0.01, momentum
0.9, no weight decay, cosine schedule, learning rate per 256 images. Two differences: features are computed
once, so every image is seen in its centre crop only; and SGD replaces LARS, which MAE uses for batches of
16384.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.contracts.seeds import seed_of
from vitpipe.optim.schedules import cosine

_MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProbe:
    """A trained linear classifier: (x - mean) / std @ weight^T + bias.

    Attributes:
        mean: of the training features, (C,).
        std: of the training features, (C,).
        weight: (K, C).
        bias: (K,).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features_NC: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, K)."""
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
    """Train a probe on the device of the features; bit-identical for the same arguments on one machine.

    Args:
        features_MC: features of the M labelled images.
        labels_M: their class numbers.
        batch: images per step; the whole set if it is smaller.
        base_lr: peak learning rate per 256 images.
        seed: of initialisation and order.
    """
    num_images, width = features_MC.shape
    batch = min(batch, num_images)
    generator = torch.Generator().manual_seed(seed_of("linear probe", seed))
    # As BatchNorm1d(affine=False, eps=1e-6) of MAE's probe: biased variance, eps under the root. Constant
    # channels get a standard deviation of 0.001 and not 0. Over the whole set, as features do not change.
    std_C, mean_C = torch.std_mean(features_MC, dim=0, correction=0)
    std_C = (std_C.square() + 1e-6).sqrt()
    standard_MC = (features_MC - mean_C) / std_C
    # Drawn on the CPU, so that a GPU starts from the same weights.
    weight = (torch.randn(num_classes, width, generator=generator) * 0.01).to(features_MC.device)
    bias = torch.zeros(num_classes, device=features_MC.device)
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.SGD([weight, bias], lr=0.0, momentum=_MOMENTUM)
    # The incomplete last batch of an epoch is dropped; another permutation follows.
    steps_per_epoch = num_images // batch
    num_steps = epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order_M = torch.randperm(num_images, generator=generator)
        first = step % steps_per_epoch * batch
        chosen = order_M[first : first + batch]
        # Linear scaling rule (Goyal et al., arXiv 1706.02677), as in MAE.
        peak_lr = base_lr * batch / 256
        for group in optimiser.param_groups:
            group["lr"] = cosine(step / num_steps, peak_lr, 0.0)
        loss = F.cross_entropy(F.linear(standard_MC[chosen], weight, bias), labels_M[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return LinearProbe(mean_C, std_C, weight.detach(), bias.detach())
