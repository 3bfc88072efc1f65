"""Gradient clipping over all tensors together, and tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitpipe.optim.clipping import clip_gradients


def parameters(scales):
    found = []
    for number, scale in enumerate(scales):
        parameter = nn.Parameter(torch.zeros(3, number + 1))
        parameter.grad = scale * torch.randn(3, number + 1, generator=torch.Generator().manual_seed(number))
        found.append(parameter)
    return found


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=5), st.floats(0.1, 10.0))
def test_every_tensor_by_itself(scales, max_norm):
    clipped = parameters(scales)
    before = [p.grad.clone() for p in clipped]
    norm = clip_gradients(clipped, max_norm, each=True, measured=False)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-5, abs=1e-6)
    for parameter, old in zip(clipped, before, strict=True):
        factor = min(1.0, max_norm / (float(old.norm()) + 1e-6))  # DINO's formula
        torch.testing.assert_close(parameter.grad, factor * old)


def test_together_and_not_at_all():
    clipped = parameters([1.0, 2.0, 3.0])
    clipped.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    reference = parameters([1.0, 2.0, 3.0])
    expected = nn.utils.clip_grad_norm_(reference, 0.5)
    assert clip_gradients(clipped, 0.5, each=False, measured=False) == pytest.approx(float(expected))
    for ours, theirs in zip(clipped, reference, strict=False):
        torch.testing.assert_close(ours.grad, theirs.grad)
    kept = [p.grad.clone() for p in reference]
    assert clip_gradients(reference, None, each=True, measured=False) is None
    assert clip_gradients(reference, None, each=True, measured=True) == pytest.approx(0.5, rel=1e-4)
    assert all(torch.equal(p.grad, g) for p, g in zip(reference, kept, strict=True))
