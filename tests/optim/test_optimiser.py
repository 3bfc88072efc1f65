"""AdamW against its textbook form."""

from __future__ import annotations

import torch
from torch import nn

from vitpipe.config.recipe import OptimConfig
from vitpipe.optim.optimiser import build_adamw, set_learning_rate


def _trained(optimiser_of, steps=5):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))]
    optimiser = optimiser_of(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimiser.step()
    return weights


def _groups(weights):
    return [
        {"params": [weights[0]], "names": ["w"], "lr_scale": 0.5, "weight_decay": 0.1},
        {"params": [weights[1]], "names": ["b"], "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def test_gives_the_bits_of_the_loop_over_tensors():
    optim = OptimConfig(base_lr=1e-3, betas=(0.9, 0.95), eps=1e-7)

    def ours(weights):
        optimiser = build_adamw(_groups(weights), optim)
        set_learning_rate(optimiser, 2e-3)
        return optimiser

    def textbook(weights):
        groups = [{**g, "lr": 2e-3 * g["lr_scale"]} for g in _groups(weights)]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-7, foreach=False)

    assert all(torch.equal(a, b) for a, b in zip(_trained(ours), _trained(textbook), strict=True))


def test_learning_rate_is_scaled_per_group():
    optimiser = build_adamw(
        _groups([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]), OptimConfig(base_lr=1.0)
    )
    set_learning_rate(optimiser, 0.4)
    assert [group["lr"] for group in optimiser.param_groups] == [0.2, 0.4]
