"""The benchmark of reversible columns: its memory count against sums by hand and the allocator, its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.profiler import profile

from vitpipe.benchmarks.memory_mode_figures import draw_errors, draw_steps, notes, step_rows
from vitpipe.benchmarks.memory_modes import (
    MODES,
    Setting,
    _Trial,
    find_device,
    forced_mode,
    measure_scales,
    measure_steps,
    relative_difference,
)
from vitpipe.benchmarks.tensor_memory import LiveMemory
from vitpipe.contracts.errors import InputError
from vitpipe.models.memory_mode import SAFE_ERROR
from vitpipe.report.figures import PAPER, save_png

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = Setting(columns=(4, 8), width=32, image_size=64, batch=2, num_rounds=1)
# The tokens, not the weights and their gradients, make the memory, as in large networks.
MANY_TOKENS = Setting(columns=(6, 10, 14), width=32, image_size=128, batch=4)


@pytest.fixture(scope="module")
def costs():
    return {(cost.columns, cost.way): cost for cost in measure_steps(SMALL, CPU)}


# Memory of live tensors


def test_a_peak_by_hand():
    x = torch.randn(1000)
    with LiveMemory() as memory:
        a = x + 1
        view = a.view(10, 100).t()  # no storage of its own, but keeps a's
        b = x + 1
        del a, b, view
        c = x.double()
        d = x[:500] + 1
    assert memory.peak_bytes() == 8000 + 2000
    assert memory.peak_bytes(without=[c]) == 8000  # a and b
    assert memory.peak_bytes(without=[d]) == 8000


def test_the_peak_of_a_backward_by_hand():
    x = torch.randn(1000, requires_grad=True)
    for _ in range(2):
        x.grad = None
        with LiveMemory() as memory:
            x.exp().sum().backward()
        # The result of exp, the sum, the gradient that the sum starts from; then the gradient of x.
        assert memory.peak_bytes() == 4000 + 4 + 4 + 4000
        assert memory.peak_bytes(without=[x.grad]) == 4000 + 4 + 4


def test_reused_addresses_are_counted_again():
    x = torch.randn(1000)
    with LiveMemory() as memory:
        for _ in range(50):
            a = x + 1
            del a
        torch.stack([x + 1 for _ in range(3)])
    assert memory.peak_bytes() == 2 * 3 * 4000


def test_what_a_checkpoint_keeps_is_seen():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 800), torch.nn.Tanh(), torch.nn.Linear(800, 8))
    x = torch.randn(100, 8, requires_grad=True)
    with LiveMemory() as memory:
        y = torch.utils.checkpoint.checkpoint(layer, x + 1, use_reentrant=False)
        after = memory.peak_bytes()
        y.sum().backward()
    assert after == 3200 + 2 * 320_000  # x + 1; the hidden units before and after the tanh
    assert memory.peak_bytes() > after


@pytest.mark.parametrize("way", MODES)
def test_the_count_is_that_of_the_allocator(way):
    trial = _Trial(MANY_TOKENS, 4, CPU)
    trial.step(way)
    counted = trial.peak_bytes(way)[1]
    trial.model.zero_grad()
    with profile(profile_memory=True) as allocator:
        trial.step(way)
    events = [event for event in allocator.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    print(f"{way}: {counted} bytes of tensors, {peak} by the allocator")
    assert counted == pytest.approx(peak, rel=0.03)


# Costs


def _chain_peak(num_columns, way):
    """Of the bottom-up chain alone, forward and backward, gradients of parameters left out."""
    trial = _Trial(MANY_TOKENS, num_columns, CPU)
    x = trial.backbone.embed(trial.images_BCHW).detach().requires_grad_()
    with LiveMemory() as memory, forced_mode(trial.backbone, way):
        sum(state.sum() for state in trial.backbone.encode(x)).backward()
    return memory.peak_bytes(without=trial.gradients().values())


def test_reversible_memory_does_not_grow_with_the_columns():
    reversible, plain, block = (
        [_chain_peak(count, way) for count in MANY_TOKENS.columns] for way in ("reversible", "plain", "block")
    )
    assert reversible[0] == reversible[1] == reversible[2]
    assert plain[2] - plain[1] == pytest.approx(plain[1] - plain[0], rel=0.01)
    assert reversible[2] < block[2] < plain[2]


def test_every_mode_is_measured(costs):
    assert set(costs) == {(count, way) for count in (4, 8) for way in MODES}
    for (_, way), cost in costs.items():
        assert 0 < cost.activation_mib <= cost.peak_mib
        assert 0 < cost.seconds_min <= cost.seconds
        assert cost.time_ratio == 1 if way == "plain" else cost.time_ratio > 0
        assert (cost.inverse_error is None) == (way != "reversible")
        assert cost.auto == "reversible"
        assert cost.gradient_error == 0 if way != "reversible" else 0 < cost.gradient_error < 1e-4
    for count in (4, 8):
        plain = costs[count, "plain"].activation_mib
        assert all(costs[count, way].activation_mib < plain for way in MODES if way != "plain")
    assert costs[4, "reversible"].inverse_error < costs[8, "reversible"].inverse_error


def test_memory_is_repeatable():
    first, second = (_Trial(SMALL, 4, CPU).peak_bytes("reversible") for _ in range(2))
    assert first == second


def test_the_backbone_is_restored_after_a_forced_mode():
    trial = _Trial(SMALL, 2, CPU)
    policy, block = trial.backbone.memory, trial.backbone.bottom_up[0].levels[0].blocks[0]
    with forced_mode(trial.backbone, "block"):
        assert "forward" in vars(block)
        assert trial.backbone.memory is not policy
    assert "forward" not in vars(block)
    assert trial.backbone.memory is policy


def test_where_inversion_is_inaccurate_training_keeps_column_inputs():
    setting = Setting(columns=(16,), width=16, image_size=64, batch=1, num_rounds=1)
    costs = measure_steps(setting, CPU)
    assert {cost.auto for cost in costs} == {"column"}
    (past,) = [note for note in notes(costs) if "exceed what float32" in note]
    inverse_error = next(cost.inverse_error for cost in costs if cost.way == "reversible")
    assert past.startswith("16 columns")
    assert f"{inverse_error:.1e}" in past


# Errors


def test_errors_rise_as_scales_fall_and_as_the_guard_expects():
    scales = (1.0, 0.5, 0.3, 0.15, 0.1)
    errors = measure_scales(SMALL, CPU, scales)
    assert [error.scale for error in errors] == list(scales)
    for name in ("inverse_error", "gradient_error", "expected_error"):
        values = [getattr(error, name) for error in errors]
        assert values == sorted(values)
    for error in errors:
        assert error.expected_error / 100 < error.gradient_error < 3 * error.expected_error
        assert (error.auto == "reversible") == (error.scale >= 0.2)
        assert error.auto == "column" or error.gradient_error < SAFE_ERROR


def test_a_difference_by_hand():
    ours, theirs = {"a": torch.tensor([3.0, 0.0])}, {"a": torch.tensor([3.0, 4.0])}
    assert relative_difference(ours, theirs) == pytest.approx(4 / 5)
    assert relative_difference({"a": torch.tensor([math.nan, 0.0])}, theirs) == math.inf


# Bad input


@pytest.mark.parametrize("count", [0, -2, 3, 1])
def test_columns_that_cannot_be_halved(count):
    with pytest.raises(InputError, match=f"{count} columns cannot be split"):
        Setting(columns=(2, count))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", "cuda:-1", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(InputError, match="has no device") as caught:
        find_device(name)
    assert "choose one of cpu" in str(caught.value)
    assert find_device("cpu") == CPU


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device(None) == CPU
    with pytest.raises(InputError, match="no device 'cuda'"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device(None) == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")


# Table and figures


def test_figures_show_what_was_measured(costs, tmp_path):
    figure = draw_steps(list(costs.values()), PAPER)
    memory, time = figure.axes
    lines = {line.get_label(): line for line in memory.lines}
    assert set(lines) == set(MODES)
    for way in MODES:
        assert list(lines[way].get_xdata()) == [4, 8]
        assert list(lines[way].get_ydata()) == [costs[count, way].activation_mib for count in (4, 8)]
    assert list(time.lines[0].get_ydata()) == [1, 1]
    errors = measure_scales(SMALL, CPU, (0.5, 0.05))
    (axes,) = draw_errors(errors, PAPER).axes
    assert list(axes.lines[0].get_ydata()) == [error.inverse_error for error in errors]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert list(axes.lines[-1].get_xdata()) == [0.2, 0.2]
    assert save_png(figure, tmp_path / "new" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_per_measurement(costs):
    rows = step_rows(list(costs.values()))
    assert [(row["columns"], row["mode"]) for row in rows] == list(costs)
    assert {row["gradient error"] for row in rows if row["mode"] == "block"} == {"0"}
