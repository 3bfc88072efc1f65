"""The moving average of weights, in any number of steps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitpipe.train.average import WeightAverage


@given(st.floats(0.01, 0.999), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8))
def test_follows_the_recursion(decay, values):
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, decay)
    expected = torch.ones(1, 2, dtype=torch.float64)
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update()
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.shadow["weight"].double(), expected, rtol=1e-4, atol=1e-5)


def test_is_apart_from_the_model_and_copies_counters():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    model(torch.randn(4, 2))
    before = average.shadow["running_mean"].clone()
    average.update()
    assert average.shadow["num_batches_tracked"] == 1
    torch.testing.assert_close(average.shadow["running_mean"], (before + model.running_mean) / 2)
    other = WeightAverage(nn.BatchNorm1d(2), 0.5)
    other.load(average.shadow)
    assert all(torch.equal(other.shadow[name], value) for name, value in average.shadow.items())
    assert other.shadow["running_mean"] is not average.shadow["running_mean"]


class Shared(nn.Module):
    """One layer under two names, a buffer that is replaced, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_averages_what_the_state_dict_has():
    model = Shared()
    average = WeightAverage(model, 0.5)
    assert average.shadow.keys() == model.state_dict().keys()
    before = average.shadow["second.bias"].clone()
    model.centre = torch.ones(2)
    nn.init.constant_(model.second.bias, 4.0)
    average.update()
    assert average.shadow["centre"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(average.shadow["second.bias"], before / 2 + 2.0)
    assert "scratch" not in average.shadow
