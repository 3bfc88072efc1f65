"""The optimisers compared with plain implementations."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from vitpipe.config.train_sections import OptimConfig
from vitpipe.optim.optimiser import build_adamw, build_optimiser, set_learning_rate


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


def test_lars_is_that_of_the_linear_probe():
    """Update by hand: v = 0.9 v + ratio * g, w -= lr * v; ratio 1 for vectors and where a norm is 0."""
    optim = OptimConfig(name="lars", base_lr=1.0, momentum=0.9, trust_coefficient=0.001)
    torch.manual_seed(1)
    start = [torch.randn(5, 3), torch.randn(3), torch.zeros(2, 2)]
    weights = [nn.Parameter(tensor.clone()) for tensor in start]
    groups = [
        {"params": [weights[0], weights[2]], "lr_scale": 1.0, "weight_decay": 0.0},
        {"params": [weights[1]], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    optimiser = build_optimiser(groups, optim)
    set_learning_rate(optimiser, 6.4)
    expected, speed = [tensor.double() for tensor in start], [torch.zeros_like(t).double() for t in start]
    for _ in range(4):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            grad, norm = weight.grad.double(), expected[i].norm()
            ratio = 0.001 * norm / grad.norm() if i != 1 and norm > 0 else 1.0
            speed[i] = 0.9 * speed[i] + ratio * grad
            expected[i] = expected[i] - 6.4 * speed[i]
        optimiser.step()
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-5)


def test_sgd_has_plain_momentum():
    """Update by hand: v = 0.8 v + g + decay * w, w -= lr * v."""
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))]
    optimiser = build_optimiser(_groups(weights), OptimConfig(name="sgd", base_lr=1.0, momentum=0.8))
    set_learning_rate(optimiser, 0.3)
    settings = [(0.15, 0.1), (0.3, 0.0)]  # learning rate and decay of the two groups
    expected, speed = [weight.detach().clone() for weight in weights], [0.0, 0.0]
    for _ in range(4):
        for i, (weight, (lr, decay)) in enumerate(zip(weights, settings, strict=True)):
            weight.grad = torch.randn_like(weight)
            speed[i] = 0.8 * speed[i] + weight.grad + decay * expected[i]
            expected[i] = expected[i] - lr * speed[i]
        optimiser.step()
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted)


def test_only_what_needs_it_imports_timm_and_the_compiler():
    code = """
import sys

import torch
from vitpipe.config.train_sections import AugmentConfig, OptimConfig
from vitpipe.data.augment import eval_transform, train_transform
from vitpipe.optim.optimiser import build_optimiser
from PIL import Image
groups = [{"params": [torch.zeros(2, 2, requires_grad=True)], "weight_decay": 0.0, "lr_scale": 1.0}]
optimiser = build_optimiser(groups, OptimConfig(base_lr=1.0))
groups[0]["params"][0].square().sum().backward()
optimiser.step()
optimiser.load_state_dict(optimiser.state_dict())
optimiser.zero_grad()
descent = build_optimiser(groups, OptimConfig(name="sgd", base_lr=1.0))
groups[0]["params"][0].square().sum().backward()
descent.step()
plain = AugmentConfig()
for transform in (train_transform(plain, 16), eval_transform(16, 1.0, plain)):
    transform(Image.new("RGB", (20, 30)))
print(*(name in sys.modules for name in ("timm", "torchvision", "torch._dynamo")))
train_transform(plain.model_copy(update={"erase_probability": 0.5}), 16)
print("timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True"]
