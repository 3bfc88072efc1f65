"""Linear classification on frozen, cached features, with one or several learning rates at once.

The protocol of MAE (He et al., arXiv 2111.06377, appendix A.1, after Doersch et al.): features standardised
per channel as by a BatchNorm without affine parameters, a linear layer initialised with std 0.01, momentum
0.9, no weight decay, cosine schedule, learning rate per 256 images. Two differences: features are computed
once, so every image is seen in its centre crop only; and SGD replaces LARS, which MAE uses for batches of
16384. That of DINO (Caron et al., arXiv 2104.14294, released code) is the same without standardisation and
with a rate that changes once per epoch.

Memory for ImageNet with four blocks of 384 channels: 7.9 GB of features as they come in; a step takes a batch
of them, 13 rates of 1000 classes 80 MB each for weights, gradients and momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import seed_of
from vitpipe.optim.optimiser import PlainSGD
from vitpipe.optim.schedules import cosine

_MOMENTUM = 0.9
_ROWS = 8192  # images at a time when measuring: 420 MB of logits of 13 rates and 1000 classes


@dataclass(frozen=True)
class LinearSettings:
    """How linear classifiers are trained.

    Attributes:
        num_classes: K.
        epochs: over the training images.
        batch: images per step; the whole set if it is smaller.
        seed: of initialisation and order.
        standardise: subtract the mean of the training features and divide by their standard deviation.
        schedule_unit: how often the learning rate follows its cosine.
    """

    num_classes: int
    epochs: int
    batch: int
    seed: int
    standardise: bool = True
    schedule_unit: Literal["step", "epoch"] = "step"


@dataclass(frozen=True)
class LinearProbes:
    """L trained linear classifiers: (x - mean) / std @ weight^T + bias.

    Attributes:
        mean: of the training features, (C,); 0 if they are not standardised.
        std: of the training features, (C,); 1 if they are not standardised.
        weight: (L, K, C).
        bias: (L, K).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features_NC: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, L, K)."""
        inputs_NC = (features_NC - self.mean) / self.std
        # All classifiers in one matrix product.
        return F.linear(inputs_NC, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(
            1, self.bias.shape
        )

    @torch.no_grad()
    def top1(self, features_NC: Tensor, labels_N: Tensor) -> list[float]:
        """Share of the images whose class has the highest logit, of every classifier."""
        hits_L = torch.zeros(len(self.weight), dtype=torch.int64, device=labels_N.device)
        for rows_NC, labels in zip(features_NC.split(_ROWS), labels_N.split(_ROWS), strict=True):
            hits_L += (self.logits(rows_NC).argmax(dim=2) == labels[:, None]).sum(dim=0)
        return [hits / max(1, len(labels_N)) for hits in hits_L.tolist()]


def train_linear(
    features_MC: Tensor,
    labels_M: Tensor,
    rates: Sequence[float],
    settings: LinearSettings,
    *,
    rows: Tensor | None = None,
    after_epoch: Callable[[LinearProbes], None] | None = None,
) -> LinearProbes:
    """Train one classifier per learning rate, all on the same batches from the same initial weights.

    On the device of the features; bit-identical for the same arguments on one machine.

    Args:
        features_MC: features of the M labelled images.
        labels_M: their class numbers.
        rates: L peak learning rates per 256 images.
        rows: numbers of the images to train on; all if not given.
        after_epoch: is shown the classifiers, whose tensors the next epoch changes.

    Raises:
        InputError: without rates, or without images.
    """
    chosen_M = torch.arange(len(features_MC)) if rows is None else rows.cpu()
    num_images = len(chosen_M)
    if not rates or not num_images:
        raise InputError(
            f"{len(rates)} linear classifiers cannot be trained on {num_images} images",
            where="base_lr, and the training set",
            fix="give at least one learning rate and one image",
        )
    batch = min(settings.batch, num_images)
    generator = torch.Generator().manual_seed(seed_of("linear probe", settings.seed))
    start = _untrained(features_MC if rows is None else features_MC[rows], len(rates), settings, generator)
    weight, bias = (values.clone().requires_grad_() for values in (start.weight, start.bias))
    # torch's optimiser has a rate per tensor: it gets the classifiers as views of the one tensor.
    views = [(weight.detach()[place], bias.detach()[place]) for place in range(len(rates))]
    optimiser = PlainSGD([{"params": list(pair)} for pair in views], lr=0.0, momentum=_MOMENTUM)
    probes = LinearProbes(start.mean, start.std, weight.detach(), bias.detach())
    # The incomplete last batch of an epoch is dropped; another permutation follows.
    steps_per_epoch = num_images // batch
    num_steps = settings.epochs * steps_per_epoch
    for step in range(num_steps):
        done = step % steps_per_epoch
        if done == 0:
            order_M = chosen_M[torch.randperm(num_images, generator=generator)]
        batch_B = order_M[done * batch : (done + 1) * batch]
        progress = (step - done if settings.schedule_unit == "epoch" else step) / num_steps
        for rate, group in zip(rates, optimiser.param_groups, strict=True):
            # Linear scaling rule (Goyal et al., arXiv 1706.02677), as in MAE and DINO.
            group["lr"] = cosine(progress, rate * batch / 256, 0.0)
        inputs_BC = (features_MC[batch_B] - probes.mean) / probes.std
        weight_grad, bias_grad = _gradients(weight, bias, inputs_BC, labels_M[batch_B])
        for place, (own_weight, own_bias) in enumerate(views):
            own_weight.grad, own_bias.grad = weight_grad[place], bias_grad[place]
        optimiser.step()
        if after_epoch and done == steps_per_epoch - 1:
            after_epoch(probes)
    return probes


def _gradients(weight: Tensor, bias: Tensor, inputs_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each classifier's own mean cross entropy, for (L, K, C) and (L, K)."""
    logits_BM = F.linear(inputs_BC, weight.flatten(0, 1), bias.flatten())
    targets = labels_B.repeat_interleave(len(weight))
    # No gradient goes from one classifier to another, so their losses may be added.
    losses = F.cross_entropy(logits_BM.view(len(targets), -1), targets, reduction="sum") / len(labels_B)
    weight_grad, bias_grad = torch.autograd.grad(losses, (weight, bias))
    return weight_grad, bias_grad


def _untrained(
    features_MC: Tensor, num_rates: int, settings: LinearSettings, generator: torch.Generator
) -> LinearProbes:
    """The same initial weights for all classifiers, and the statistics of the training features."""
    width, device = features_MC.shape[1], features_MC.device
    if settings.standardise:
        # As BatchNorm1d(affine=False, eps=1e-6) of MAE's probe: biased variance, eps under the root. Constant
        # channels get a standard deviation of 0.001 and not 0. Over the whole set, as features do not change.
        std_C, mean_C = torch.std_mean(features_MC, dim=0, correction=0)
        std_C = (std_C.square() + 1e-6).sqrt()
    else:
        mean_C, std_C = torch.zeros(width, device=device), torch.ones(width, device=device)
    # Drawn on the CPU, so that a GPU starts from the same weights.
    weight_KC = (torch.randn(settings.num_classes, width, generator=generator) * 0.01).to(device)
    bias = torch.zeros(num_rates, settings.num_classes, device=device)
    return LinearProbes(mean_C, std_C, weight_KC.expand(num_rates, -1, -1), bias)
