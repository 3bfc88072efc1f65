"""The losses of every head follow golden/dense_curves.json: the first steps exactly, fifty in their mean."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from dense_curves import HEADS, NUM_STEPS, losses_of

pytestmark = [pytest.mark.dense, pytest.mark.slow]
CURVES = json.loads((Path(__file__).parents[1] / "golden" / "dense_curves.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in another order differ in the last digits, which training magnifies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_the_first_steps(prepared, tmp_path, head):
    losses = losses_of(head, prepared, tmp_path)
    assert len(losses) == NUM_STEPS
    # Rounding is magnified: the fused optimiser, whose first updates agree in seven digits, moved single losses
    # of the last steps by up to 13 % (sampled boxes are a yes or no) and the means of these runs by up to 1 %.
    # A wrong rate or another draw shows in the first steps.
    assert losses[:8] == pytest.approx(CURVES[head][:8], rel=1e-4)
    assert statistics.fmean(losses) == pytest.approx(statistics.fmean(CURVES[head]), rel=0.03)
