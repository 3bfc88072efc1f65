"""The memory mode, from the requested mode, autocast, the scales and the length of the chain."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.models.memory_mode import SAFE_ERROR, SAFE_SCALE, expected_error, resolve_mode, safe_scale


@pytest.mark.parametrize(
    ("requested", "under_autocast", "smallest", "inversions", "allowed", "mode", "reason"),
    [
        ("auto", False, 0.5, 2, False, "reversible", ""),
        ("auto", True, 0.5, 2, False, "column", ""),
        ("auto", True, 0.5, 2, True, "column", ""),
        ("auto", False, 0.19, 2, False, "column", "0.19"),
        ("auto", False, 0.19, 1, False, "column", "0.19"),
        ("auto", False, 0.5, 5, False, "column", "below 0.51"),
        ("auto", False, 0.52, 5, False, "reversible", ""),
        ("auto", False, 0.5, 8, False, "column", "through 8 columns"),
        ("auto", False, 1.0, 1000, False, "reversible", ""),
        ("auto", False, math.inf, 0, False, "reversible", ""),
        ("reversible", True, 0.5, 2, False, "column", "under autocast"),
        ("reversible", True, 0.5, 2, True, "reversible", ""),
        ("reversible", True, 0.1, 2, True, "column", "0.1"),
        ("reversible", False, math.nan, 2, False, "column", "nan"),
        ("reversible", False, 0.5, 8, False, "column", "0.5"),
        ("column", False, 0.5, 8, False, "column", ""),
        ("plain", True, 0.01, 8, False, "plain", ""),
    ],
)
def test_resolve_mode(requested, under_autocast, smallest, inversions, allowed, mode, reason):
    choice = resolve_mode(
        requested,
        under_autocast=under_autocast,
        smallest_scale=smallest,
        num_inversions=inversions,
        allow_reversible_amp=allowed,
    )
    assert choice.mode == mode
    assert bool(choice.reason) == bool(reason)
    assert reason in choice.reason


@given(count=st.integers(1, 64))
def test_longer_chains_need_larger_scales(count):
    assert SAFE_SCALE <= safe_scale(count) <= safe_scale(count + 1) < 1
    assert expected_error(count, safe_scale(count)) <= 1.001 * SAFE_ERROR
    assert safe_scale(count) == SAFE_SCALE or expected_error(count, 0.99 * safe_scale(count)) > SAFE_ERROR
