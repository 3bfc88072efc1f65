"""Chains of columns: every memory mode gives the gradients of ordinary autograd."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitpipe.models.blocks import drop_path
from vitpipe.models.memory_mode import MemoryPolicy, num_inversions
from vitpipe.models.reversible import Column, clamp_scales, inverse_error, run_chain, smallest_scale

WIDTH = 6
MODES = ["plain", "column", "reversible"]


class ToyLevel(nn.Module):
    """A level that draws random numbers twice and reads some of the states above it."""

    def __init__(self, num_above, drop_ratio):
        super().__init__()
        self.down = nn.Linear(WIDTH, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_above))
        self.drop_ratio = drop_ratio
        self.dropout = nn.Dropout(drop_ratio)

    def forward(self, below, above):
        x = self.down(below)
        for link, state in zip(self.up, above, strict=False):
            x = x + link(state)
        return below + drop_path(self.dropout(torch.tanh(x)), self.drop_ratio, self.training)


class ToyColumn(Column):
    """Levels and scales; without scales for the start of a chain."""

    def __init__(self, num_levels, *, is_first, scale=0.5, drop_ratio=0.0, reach=9):
        super().__init__()
        self.parts = nn.ModuleList(
            ToyLevel(0 if is_first else min(reach, num_levels - 1 - position), drop_ratio)
            for position in range(num_levels)
        )
        self.factors = nn.ParameterList(torch.full((WIDTH,), scale) for _ in self.parts if not is_first)

    @property
    def num_levels(self):
        return len(self.parts)

    def level(self, position):
        return self.parts[position]

    def scales(self):
        return tuple(self.factors)


def _chain(num_columns, *, num_levels=3, with_states=False, dtype=torch.float64, seed=0, **options):
    """Columns, the input, the states before the first column (or none)."""
    torch.manual_seed(seed)
    columns = nn.ModuleList(
        ToyColumn(num_levels, is_first=index == 0 and not with_states, **options)
        for index in range(num_columns)
    ).to(dtype)
    x = torch.randn(3, 4, WIDTH, dtype=dtype, requires_grad=True)
    states = tuple(torch.randn(3, 4, WIDTH, dtype=dtype, requires_grad=True) for _ in range(num_levels))
    return columns, x, states if with_states else None


def _gradients(columns, x, states, mode, *, seed=1, loss=lambda out: sum((y * y).sum() for y in out)):
    """By name: the outputs' gradients with respect to everything that wants one."""
    leaves = dict(columns.named_parameters()) | {"x": x}
    leaves |= {f"state{index}": state for index, state in enumerate(states or ())}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(seed)
    loss(run_chain(list(columns), x, states, mode=mode)).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def _difference(ours, plain):
    """Global relative difference; the same names must have a gradient."""
    assert {name for name in ours if ours[name] is not None} == {n for n in plain if plain[n] is not None}
    names = [name for name in plain if plain[name] is not None]
    off = math.sqrt(sum((ours[name] - plain[name]).square().sum().item() for name in names))
    return off / math.sqrt(sum(plain[name].square().sum().item() for name in names))


@settings(max_examples=12, deadline=None)
@given(
    num_columns=st.integers(1, 4),
    num_levels=st.integers(1, 4),
    with_states=st.booleans(),
    drop_ratio=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_every_mode_gives_the_same_gradients(num_columns, num_levels, with_states, drop_ratio, seed):
    case = _chain(
        num_columns, num_levels=num_levels, with_states=with_states, drop_ratio=drop_ratio, seed=seed
    )
    plain, column, reversible = (_gradients(*case, mode) for mode in MODES)
    assert all(torch.equal(column[name], plain[name]) for name in plain)
    assert _difference(reversible, plain) < 1e-12


def test_float32_gradients():
    case = _chain(3, with_states=True, drop_ratio=0.3, dtype=torch.float32)
    difference = _difference(_gradients(*case, "reversible"), _gradients(*case, "plain"))
    print(f"float32: {difference:.1e}")
    assert difference < 1e-5


def test_the_reversible_gradient_is_the_derivative():
    columns, x, states = _chain(2, with_states=True)
    assert torch.autograd.gradcheck(
        lambda x, *states: run_chain(list(columns), x, states, mode="reversible"), (x, *states)
    )


def test_the_forward_equation():
    columns, x, states = _chain(1, num_levels=2, with_states=True)
    (column,) = columns
    y0 = column.level(0)(x, states[1:]) + 0.5 * states[0]
    y1 = column.level(1)(y0, ()) + 0.5 * states[1]
    for mode in MODES:
        ours = run_chain([column], x, states, mode=mode)
        torch.testing.assert_close(ours, (y0, y1), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_generators_go_on_as_after_a_plain_forward(mode):
    columns, x, states = _chain(3, drop_ratio=0.5)
    torch.manual_seed(5)
    run_chain(list(columns), x, states)
    after_forward = torch.rand(4)
    torch.manual_seed(5)
    out = run_chain(list(columns), x, states, mode=mode)
    out[0].sum().backward()
    assert torch.equal(torch.rand(4), after_forward)


@pytest.mark.parametrize("mode", ["column", "reversible"])
def test_unused_outputs_and_frozen_parts(mode):
    columns, x, states = _chain(3, with_states=True, drop_ratio=0.2)
    columns[1].level(0).requires_grad_(False)
    columns[2].factors[1].requires_grad_(False)
    columns[0].requires_grad_(False)
    case = (columns, x.detach(), tuple(state.detach() for state in states))
    ours, plain = (_gradients(*case, m, loss=lambda out: out[-1].sum()) for m in (mode, "plain"))
    assert ours["x"] is None
    assert ours["state0"] is None
    assert ours["1.parts.0.down.weight"] is None
    assert ours["2.factors.1"] is None
    assert ours["2.factors.0"] is not None
    assert _difference(ours, plain) < 1e-12


def test_nothing_is_kept_when_no_parameter_is_trained():
    columns, x, states = _chain(2)
    columns.requires_grad_(False)
    out = run_chain(list(columns), x.detach(), states, mode="reversible")
    assert not any(y.requires_grad for y in out)
    with torch.no_grad():
        assert not run_chain(list(columns), x, states, mode="reversible")[0].requires_grad


def test_accumulated_and_scaled_gradients_and_hooks():
    case = _chain(3, with_states=True, dtype=torch.float32)
    once = {name: grad.clone() for name, grad in _gradients(*case, "reversible").items()}
    columns, x, states = case
    columns.zero_grad()
    calls = []
    parameter = columns[1].level(0).down.weight
    parameter.register_hook(lambda grad: calls.append("before"))
    parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("after"))
    for _ in range(2):
        out = run_chain(list(columns), x, states, mode="reversible")
        (1024 * sum((y * y).sum() for y in out)).backward()
    assert calls == ["before", "after"] * 2
    # Gradient scalers use powers of two, which are exact.
    assert all(torch.equal(p.grad, 2048 * once[name]) for name, p in columns.named_parameters())


def test_second_derivatives_are_refused():
    columns, x, states = _chain(2)
    out = run_chain(list(columns), x, states, mode="reversible")
    (grad,) = torch.autograd.grad(out[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["column", "reversible"])
def test_under_autocast(mode):
    columns, x, states = _chain(3, with_states=True, drop_ratio=0.2, dtype=torch.float32)
    found = {}
    for name in ("plain", mode):
        with torch.autocast("cpu", torch.bfloat16):
            out = run_chain(list(columns), x, states, mode=name)
            # A bfloat16 input, as a convolution before the chain would give it.
            half = run_chain(list(columns), x.bfloat16(), states, mode=name)
        assert {y.dtype for y in (*out, *half)} == {torch.float32}

        def loss(out):
            return sum((y * y).sum() for y in out)

        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(2)
            out = run_chain(list(columns), x, states, mode=name)
        found[name] = torch.autograd.grad(loss(out), [x, *states, *columns.parameters()])
    pairs = list(zip(found[mode], found["plain"], strict=True))
    if mode == "column":
        assert all(torch.equal(ours, plain) for ours, plain in pairs)
    else:
        # The backward has re-entered autocast (its F is bfloat16's), but rebuilt states are inexact.
        off = max(((ours - plain).norm() / plain.norm()).item() for ours, plain in pairs)
        print(f"reversible under bfloat16: worst tensor {off:.1e}")
        assert 0 < off < 0.1


def test_a_validation_inside_the_same_autocast_leaves_gradients_alone():
    columns, x, states = _chain(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inverse_error(list(columns), x, states)
        run_chain(list(columns), x, states, mode="reversible")
        out = run_chain(list(columns), x, states, mode="plain")
    out[0].sum().backward()
    assert columns[1].level(0).down.weight.grad is not None


def _kept_bytes(columns, x, states, mode):
    own = {parameter.untyped_storage().data_ptr() for parameter in columns.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run_chain(list(columns), x, states, mode=mode)
    assert out[0].requires_grad
    return sum(size for size, _ in kept.values())


def test_kept_memory_does_not_grow_with_the_columns():
    kept = {
        mode: [_kept_bytes(*_chain(n, drop_ratio=0.1), mode) for n in (1, 2, 4, 8)]
        for mode in ("plain", "reversible")
    }
    one_state = 3 * 4 * WIDTH * 8
    assert kept["reversible"] == [4 * one_state] * 4
    assert kept["plain"][3] > 6 * kept["plain"][0]


def test_positions_left_out():
    columns, x, states = _chain(2, num_levels=4, with_states=True, reach=1)
    whole = run_chain(list(columns), x, states)
    for mode in ("plain", "column"):
        (top,) = run_chain(list(columns), x, states, mode=mode, num_positions=(2, 1))
        assert torch.equal(top, whole[0])
    with pytest.raises(ValueError, match="cannot be inverted"):
        run_chain(list(columns), x, states, mode="reversible", num_positions=(2, 1))
    with pytest.raises(ValueError, match="at least one column"):
        run_chain([], x, states)


def test_the_error_of_the_inverse():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    errors = {}
    for scale in (0.5, 0.1, 0.01):
        columns, x, states = _chain(3, scale=scale, drop_ratio=0.3, dtype=torch.float32)
        torch.set_rng_state(before)
        errors[scale] = inverse_error(list(columns), x, states)
        assert torch.equal(torch.get_rng_state(), before)
        assert inverse_error(list(columns), x, states) == errors[scale]
    assert 0 < errors[0.5] < 1e-4 < 100 * errors[0.5] < errors[0.01]
    columns, x, states = _chain(3, with_states=True)
    assert inverse_error(list(columns), x, states) < 1e-12
    assert inverse_error(list(columns)[:1], x, states) < 1e-13
    columns, x, _ = _chain(1)
    assert inverse_error(list(columns), x) == 0


@given(values=st.lists(st.floats(-2, 2, width=32), min_size=WIDTH, max_size=WIDTH))
@settings(max_examples=50, deadline=None)
def test_scales_are_kept_away_from_zero(values):
    column = ToyColumn(1, is_first=False)
    given_scale = torch.tensor(values)
    with torch.no_grad():
        column.factors[0].copy_(given_scale)
    clamp_scales([column])
    scale = column.factors[0].detach()
    assert (scale.abs() >= torch.tensor(1e-3)).all()
    far = given_scale.abs() >= 1e-3
    assert torch.equal(scale[far], given_scale[far])
    assert torch.equal(scale < 0, given_scale < 0)
    assert smallest_scale([column]) == scale.abs().min()


def test_a_long_chain_is_kept_by_columns_with_one_warning():
    (columns, x, _), policy = _chain(9, dtype=torch.float32), MemoryPolicy()
    assert num_inversions(columns) == 8
    assert num_inversions(_chain(3, with_states=True)[0]) == 3
    with pytest.warns(RuntimeWarning, match="through 8 columns") as warned:
        modes = {policy.prepare(list(columns), x.device, training=True) for _ in range(3)}
    assert modes == {"column"}
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = list(columns)[:4]
        assert MemoryPolicy("reversible").prepare(short, x.device, training=True) == "reversible"


def test_the_policy_clamps_and_warns_once():
    policy = MemoryPolicy("reversible")
    columns, device = list(_chain(2, scale=0.5, dtype=torch.float32)[0]), torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.prepare(columns, device, training=True) == "reversible"
    with torch.no_grad():
        assert policy.prepare(columns, device, training=True) == "plain"
        columns[1].factors[0][2] = -1e-4
    with pytest.warns(RuntimeWarning, match="0.0001"):
        assert policy.prepare(columns, device, training=False) == "column"
    assert columns[1].factors[0][2] == -1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.prepare(columns, device, training=True) == "column"
    assert columns[1].factors[0][2] == -1e-3
    assert MemoryPolicy("auto").prepare(columns[:1], device, training=True) == "reversible"


def test_two_forwards_before_one_backward():
    columns, x, states = _chain(2, with_states=True)
    policy, columns = MemoryPolicy(), list(columns)
    total = 0
    for _ in range(2):
        mode = policy.prepare(columns, x.device, training=True)
        total = total + run_chain(columns, x, states, mode=mode)[0].sum()
    total.backward()
    assert x.grad.isfinite().all()
