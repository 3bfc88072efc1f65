"""The localisation loss: recorded numbers of the paper's formulas, numeric gradients, facts that must hold."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitpipe.methods.drloc.config import DrlocConfig, grid_misfit, pooled_grid
from vitpipe.methods.drloc.localisation import (
    LocationMLP,
    Pairs,
    draw_pairs,
    equation_factor,
    location_loss,
    num_offset_classes,
    pair_embeddings,
    pooled,
    trivial_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden"
NUMBERS = json.loads((GOLDEN / "drloc.json").read_text())
RECORDED = {entry["name"]: entry for entry in NUMBERS["loss"]}
KINDS = ("drloc", "signed", "ce", "reg")
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: max(grid) > 1)

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec is not None
assert _spec.loader is not None
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


def positions(entry: dict, k: int = 7) -> Pairs:
    """The recorded positions, made again as `conventions` state them."""
    n, m = entry["n"], entry["m"]
    if entry["positions"]["kind"] == "drawn":
        torch.manual_seed(0)
        return Pairs(torch.randint(k, (n, m, 2)), torch.randint(k, (n, m, 2)))
    b, q = torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")
    first = torch.stack([(3 * q + b) % k, (5 * q + 2 * b + 1) % k], dim=-1)
    return Pairs(first, torch.stack([(2 * q**2 + b + 4) % k, (q + 3 * b) % k], dim=-1))


def mlp_of(width: int) -> LocationMLP:
    mlp = LocationMLP(width, 512, trunc_normal=True)
    with torch.no_grad():
        fill.fill(mlp.state_dict())
    return mlp


@pytest.mark.parametrize(("ours", "recorded"), [("drloc", "drloc"), ("signed", "drloc_star")])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_values_and_gradients(name, ours, recorded):
    entry, wanted = RECORDED[name], RECORDED[name][recorded]
    pairs, k = positions(entry), entry["k"]
    assert pairs.first_BM2.sum() == entry["positions"]["pos_1_sum"]
    assert pairs.second_BM2[0, :8].tolist() == entry["positions"]["pos_2_image0_first8"]
    grid = fill.probe(tuple(entry["grid"]["probe_shape"]), entry["grid"]["seed"]).requires_grad_()
    outputs = mlp_of(entry["D"])(pair_embeddings(grid, pairs))
    digest = fill.digest(torch.stack(outputs, dim=-1))
    assert digest["values"] == pytest.approx(wanted["pred"]["values"], abs=1e-5)
    loss = location_loss(ours, outputs, pairs.offsets_BM2, (k, k))
    assert loss.item() == pytest.approx(wanted["loss_mean"], rel=1e-4)
    equation = equation_factor(ours, entry["n"]) * loss.item()
    assert equation == pytest.approx(wanted["loss_equation"], rel=1e-4)
    raw = location_loss(ours, outputs, pairs.offsets_BM2, (k, k), raw_targets=True)
    assert raw.item() == pytest.approx(wanted["official_code_raw_target"], rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, grid)
    expected = wanted["grad_grid_of_loss_mean"]
    assert int((gradient != 0).sum()) == expected["nonzero"]
    assert float(gradient.norm()) == pytest.approx(expected["l2"], rel=1e-3)
    found = fill.digest(1e6 * gradient)["values"]
    assert found == pytest.approx(expected["times_1e6"]["values"], rel=1e-3, abs=1e-2)


@pytest.mark.parametrize(
    ("pooling", "name"), [("2x2", "pool2x2_stride2"), ("3x3", "pool3x3_stride2_pad1_excl")]
)
def test_pooling_is_that_of_windows_whose_padding_does_not_count(pooling, name):
    # The network's grid is not at hand, only what pooling it gave; both ways agree in the recorded corner.
    recorded = next(entry for entry in NUMBERS["models"] if entry["model"] == "t2t_vit_14")["recorded"]
    assert recorded[f"grid_{name}"]["shape"] == [2, 384, *pooled_grid((14, 14), pooling)]
    grid = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    found = pooled(grid, pooling)
    assert tuple(found.shape[2:]) == pooled_grid((6, 8), pooling)
    for row in range(3):
        for column in range(4):
            rows, columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            if pooling == "3x3":
                rows, columns = (slice(max(0, s.start - 1), s.stop) for s in (rows, columns))
            torch.testing.assert_close(found[:, :, row, column], grid[:, :, rows, columns].mean((2, 3)))
    assert pooled(grid, "none") is grid


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_differences(kind):
    generator = torch.Generator().manual_seed(1)
    size = (3, 4)
    grid = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).requires_grad_()
    classes = num_offset_classes(size) if kind in ("ce", "reg") else None
    torch.manual_seed(2)
    mlp = LocationMLP(3, 6, classes, trunc_normal=False).double()
    pairs = draw_pairs(5, torch.arange(2), 7, size)

    def loss(map_BDRC: Tensor, *weights: Tensor) -> Tensor:
        names = [name for name, _ in mlp.named_parameters()]
        outputs = torch.func.functional_call(
            mlp, dict(zip(names, weights, strict=True)), pair_embeddings(map_BDRC, pairs)
        )
        return location_loss(kind, outputs, pairs.offsets_BM2, size)

    assert torch.autograd.gradcheck(loss, (grid, *mlp.parameters()))


@given(GRIDS, st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_positions_lie_in_the_grid_and_belong_to_the_image(grid, num_pairs, key):
    indices = torch.tensor([7, 3, 11])
    found = draw_pairs(key, indices, num_pairs, grid)
    for at in found:
        assert at.shape == (3, num_pairs, 2)
        assert at.dtype == torch.int64
        assert at.min() >= 0
        assert (at.amax((0, 1)) < torch.tensor(grid)).all()
    alone = draw_pairs(key, indices[1:2], num_pairs, grid)
    assert all(torch.equal(one[0], of_all[1]) for one, of_all in zip(alone, found, strict=True))


def test_the_largest_number_is_still_below_the_side(monkeypatch):
    import vitpipe.methods.drloc.localisation as module

    monkeypatch.setattr(
        module, "uniform", lambda _key, indices, num: torch.full((len(indices), num), 1 - 2.0**-24)
    )
    for side in range(1, 600):
        assert draw_pairs(0, torch.arange(1), 1, (side, side)).first_BM2.max() == side - 1


@pytest.mark.parametrize(("k", "distance", "best"), [(7, 0.326531, 66 / 343), (14, 0.331633, 0.194606)])
def test_mean_distance_and_best_constant_are_the_papers_facts(k, distance, best):
    assert (k**2 - 1) / (3 * k**2) == pytest.approx(distance, abs=1e-6)
    offsets = draw_pairs(3, torch.arange(400), 400, (k, k)).offsets_BM2
    # 160,000 pairs: a standard deviation of 0.0006.
    assert (offsets.abs().float() / k).mean((0, 1)).tolist() == pytest.approx([distance] * 2, abs=0.003)
    assert offsets.float().mean().item() / k == pytest.approx(0.0, abs=0.003)
    assert trivial_loss("drloc", (k, k)) == pytest.approx(best, abs=1e-6)
    assert trivial_loss("signed", (k, k)) == pytest.approx(distance, abs=1e-6)


def test_recorded_facts_of_other_targets():
    assert trivial_loss("drloc", (7, 7), raw_targets=True) == pytest.approx(1.347, abs=1e-3)
    assert trivial_loss("signed", (7, 7), raw_targets=True) == pytest.approx(7 * 0.326531, abs=1e-4)
    assert trivial_loss("ce", (7, 7)) == pytest.approx(4.8583, abs=1e-4)


def _outputs_of_prior(k: int, num_pairs: int) -> list[Tensor]:
    """Logits of the exact prior of offsets, for every pair."""
    share = torch.tensor([max(k - abs(c), 0) / k**2 for c in range(-k, k + 1)])
    return [share.clamp(min=1e-30).log().expand(1, num_pairs, -1)] * 2


def test_values_of_predictors_that_know_nothing():
    k = 7
    at = torch.cartesian_prod(*[torch.arange(k)] * 4)[None]
    pairs = Pairs(at[..., :2], at[..., 2:])
    same = [torch.zeros(1, k**4, 2 * k + 1)] * 2
    prior = _outputs_of_prior(k, k**4)

    def loss(kind, outputs):
        return location_loss(kind, outputs, pairs.offsets_BM2, (k, k)).item()

    assert loss("ce", same) == pytest.approx(2 * math.log(15), abs=1e-4)
    assert loss("ce", prior) == pytest.approx(trivial_loss("ce", (k, k)), abs=1e-4)
    assert loss("reg", prior) == pytest.approx(2.0021, abs=1e-4)
    # Mass at both ends: the largest variance.
    ends = torch.full((2 * k + 1,), -1e9)
    ends[0] = ends[-1] = 0.0
    assert loss("reg", [ends.expand(1, k**4, -1)] * 2) == pytest.approx(trivial_loss("reg", (k, k)), abs=1e-5)
    median = torch.full((1, k**4), 2 / 7)
    assert loss("drloc", [median] * 2) == pytest.approx(66 / 343, abs=1e-6)


@given(GRIDS, st.sampled_from(KINDS), st.integers(0, 10**6))
def test_no_constant_beats_the_trivial_loss(grid, kind, seed):
    rows, columns = grid
    at = torch.cartesian_prod(*map(torch.arange, (rows, columns, rows, columns)))[None]
    offsets = (at[..., :2] - at[..., 2:]).double()
    generator = torch.Generator().manual_seed(seed)

    def constant(side: int) -> Tensor:
        if kind in ("ce", "reg"):
            logits = 3 * torch.randn(2 * side + 1, generator=generator, dtype=torch.float64)
            return logits.expand(1, offsets.shape[1], -1)
        return torch.rand((), generator=generator, dtype=torch.float64).expand(1, offsets.shape[1])

    outputs = [constant(side) for side in grid]
    found = location_loss(kind, outputs, offsets.long(), grid).item()
    assert found >= trivial_loss(kind, grid) - 1e-9


@given(GRIDS, st.integers(0, 1000))
def test_targets_of_grids_that_are_not_square(grid, seed):
    rows, columns = grid
    pairs = draw_pairs(seed, torch.arange(2), 6, grid)
    # Embeddings that are their own row and column, so that a wrong index of a cell shows.
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).float()
    found = pair_embeddings(where.expand(2, -1, -1, -1), pairs)
    assert torch.equal(found.long(), torch.cat(list(pairs), dim=-1))
    exact = (found[..., :2] - found[..., 2:]) / torch.tensor(grid)
    assert location_loss("signed", exact.unbind(-1), pairs.offsets_BM2, grid).item() < 1e-6
    assert location_loss("drloc", exact.abs().unbind(-1), pairs.offsets_BM2, grid).item() < 1e-6
    assert exact.abs()[..., 0].max() <= (rows - 1) / rows
    assert exact.abs()[..., 1].max() <= (columns - 1) / columns
    zeros = [torch.zeros(2, 6)] * 2
    raw = location_loss("signed", zeros, pairs.offsets_BM2, grid, raw_targets=True)
    shifted = pairs.offsets_BM2 + torch.tensor(grid) - 1
    assert shifted.min() >= 0
    assert raw.item() == pytest.approx(shifted.float().mean().item(), rel=1e-5)


@given(st.lists(st.floats(-20, 20), min_size=9, max_size=9), st.integers(-3, 3))
def test_losses_on_classes_are_the_written_out_ones(logits, offset):
    k = 4
    share = [math.exp(x) for x in logits]
    share = [x / sum(share) for x in share]
    mean = sum(p * c for p, c in zip(share, range(-k, k + 1), strict=True))
    variance = sum(p * (c - mean) ** 2 for p, c in zip(share, range(-k, k + 1), strict=True)) + 1e-8
    outputs = [torch.tensor(logits, dtype=torch.float64).view(1, 1, -1)] * 2
    offsets = torch.full((1, 1, 2), offset)
    found = {kind: location_loss(kind, outputs, offsets, (k, k)).item() for kind in ("ce", "reg")}
    assert found["ce"] == pytest.approx(-2 * math.log(share[offset + k]), rel=1e-9, abs=1e-9)
    wanted = 2 * ((offset - mean) ** 2 / variance + 0.001 * math.log(math.sqrt(variance)))
    assert found["reg"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("width", "parameters"), [(384, 657_410), (768, 1_050_626), (2048, 2_361_346)])
def test_parameters_of_the_mlp(width, parameters):
    assert sum(p.numel() for p in LocationMLP(width, 512, trunc_normal=True).parameters()) == parameters
    classes = LocationMLP(width, 512, num_offset_classes((7, 7)), trunc_normal=True)
    assert sum(p.numel() for p in classes.parameters()) == parameters + 2 * 513 * 15 - 2 * 513
    assert [head.out_features for head in classes.unshared] == [15, 15]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_more_than_the_best_constant(kind):
    torch.manual_seed(0)
    classes = num_offset_classes((4, 4)) if kind in ("ce", "reg") else None
    mlp, grid = LocationMLP(8, 64, classes, trunc_normal=False), torch.randn(4, 8, 4, 4, requires_grad=True)
    optimiser = torch.optim.AdamW([grid, *mlp.parameters()], lr=5e-3)
    for step in range(200):
        pairs = draw_pairs(step, torch.arange(4), 64, (4, 4))
        loss = location_loss(kind, mlp(pair_embeddings(grid, pairs)), pairs.offsets_BM2, (4, 4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.7 * trivial_loss(kind, (4, 4))


@given(GRIDS, st.sampled_from(["none", "2x2", "3x3"]))
def test_a_grid_is_refused_exactly_when_nothing_is_left_to_localise(grid, pooling):
    why = grid_misfit(grid, pooling)
    if pooling == "2x2" and (grid[0] % 2 or grid[1] % 2):
        assert why.startswith("pooling 2x2")
        return
    map_BDRC = torch.zeros(1, 1, *grid)
    behind = tuple(pooled(map_BDRC, pooling).shape[2:])
    assert behind == pooled_grid(grid, pooling)
    assert bool(why) == (behind == (1, 1))


def test_the_defaults_are_the_papers():
    config = DrlocConfig()
    assert (config.loss, config.pairs, config.hidden_width, config.reduction) == ("drloc", 64, 512, "mean")
    assert (config.weight_schedule, config.raw_targets, config.label_smoothing) == ("constant", False, 0.1)
