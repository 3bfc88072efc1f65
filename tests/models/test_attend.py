"""Attention with a learnt bias is the same function by both ways of computing it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitpipe.models.blocks import attend


@pytest.mark.parametrize("bias_shape", [(1, 3, 5, 5), (2, 3, 5, 5)])
def test_values_and_gradients_are_those_of_the_fused_kernel(bias_shape):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, 3, 5, 4, generator=generator, requires_grad=True) for _ in range(3)]
    bias = torch.randn(bias_shape, generator=generator, requires_grad=True)
    weight = torch.randn(2, 3, 5, 4, generator=generator)
    found, expected = attend(*tokens, bias), F.scaled_dot_product_attention(*tokens, attn_mask=bias)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (*tokens, bias)),
        torch.autograd.grad((expected * weight).sum(), (*tokens, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(attend(*tokens, bias), found)
