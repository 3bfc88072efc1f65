"""Hidden pixels reach nothing in iTPN's networks, and what looks for them finds them in wrong networks."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vitpipe.benchmarks.information_leak import find_leaks, misaligned, with_crossing_convolution
from vitpipe.cli import app
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.models.build import build_pretrainer
from vitpipe.models.families import family_of
from vitpipe.models.masking import choose_units

SIDE, NUM_UNITS = 64, 16
LEVELS = [f"{part} {stride}" for part in ("stage", "pyramid") for stride in (4, 8, 16)]
ENDS = {"pixels": ["decoder input"], "features": ["head input", "early head input"]}
KINDS = tuple(ENDS)


def _network(kind, *, aligned=True):
    torch.manual_seed(3)
    model = model_config({"name": "hivit_nano", "image_size": SIDE, "layer_scale": 0.1})
    if kind == "pixels":
        return build_pretrainer(model)
    return family_of(model).feature_predictor(model, target_width=8, drop_path=0.1, aligned=aligned)


def _found(network, seed=0):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(2, NUM_UNITS, generator=torch.Generator().manual_seed(seed + 1))
    mask = choose_units(noise, 0.75).mask_BN
    return {change.feature: change for change in find_leaks(network, images, mask)}, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_hidden_pixels_reach_no_level_and_no_input_of_a_prediction(kind, seed):
    network = _network(kind).train()
    found, _ = _found(network, seed)
    assert list(found) == LEVELS + ENDS[kind]
    assert {name: change.num_leaks for name, change in found.items()} == dict.fromkeys(found, 0)
    assert network.training


def test_hidden_units_at_strides_4_and_8_change_and_nothing_reads_them():
    """So the pixels were replaced; the pyramid without them is what `aligned` is for."""
    found, mask = _found(_network("features"))
    for name in ("stage 4", "stage 8"):
        assert torch.equal(found[name].size_BN > 0, mask.bool())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_two_levels_that_are_not_aligned_are_found(kind):
    found, mask = _found(misaligned(_network(kind)))
    leaking = {name for name, change in found.items() if change.num_leaks}
    # The pyramid at stride 16 reads nothing of strides 4 and 8.
    assert {"pyramid 4", "pyramid 8", ENDS[kind][0]} <= leaking
    assert not leaking & {"stage 16", "pyramid 16", "early head input"}
    # Of features: hidden units whose left neighbour is visible. Of pixels: visible ones left of a hidden unit.
    moved = mask.roll(1, 1) if kind == "features" else mask.roll(-1, 1)
    expected = mask.bool() & ~moved.bool() if kind == "features" else ~mask.bool() & moved.bool()
    assert torch.equal(found["pyramid 8"].leak_BN, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_that_crosses_units_is_found(kind):
    found, mask = _found(with_crossing_convolution(_network(kind)))
    assert all(change.num_leaks for name, change in found.items()), found.keys()
    # At stride 4 only visible units beside a hidden one: the kernel reaches 3 pixels into its neighbours.
    grid = mask.view(-1, 1, 4, 4)
    near = torch.nn.functional.max_pool2d(grid, 3, stride=1, padding=1).flatten(1).bool()
    assert not (found["stage 4"].leak_BN & ~near).any()
    assert not (found["stage 4"].leak_BN & mask.bool()).any()


def test_as_released_the_teachers_network_leaks_at_hidden_units():
    found, mask = _found(_network("features", aligned=False))
    for name in ("pyramid 4", "pyramid 8", "head input"):
        assert torch.equal(found[name].leak_BN, mask.bool())
    assert not found["pyramid 16"].num_leaks


def test_a_mask_that_the_network_cannot_hide_is_refused():
    images, mask = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, NUM_UNITS)
    with pytest.raises(InputError, match="hides 12 units of an image, the mask 0"):
        find_leaks(_network("pixels"), images, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verb_shows_every_form(kind, tmp_path):
    small = ["benchmark", "leak", "hivit_nano", "--supervision", kind, "--image-size", "64"]
    done = CliRunner().invoke(app, [*small, "--figure", str(tmp_path / "leak.png")])
    assert done.exit_code == 0, done.output
    assert "masks of strides 4 and 8 moved" in done.output
    assert (tmp_path / "leak.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(CliRunner().invoke(app, [*small, "--json"]).stdout)
    leaks = {row["form"]: sum(row["leaks"].values()) for row in found["forms"]}
    assert leaks.pop("as built") == 0
    assert len(leaks) == (2 if kind == "pixels" else 3)
    assert all(leaks.values())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["vit_nano"], "no pyramid"), (["hivit_nano", "--supervision", "sound"], "pixels or features"),
     (["hivit_nano", "--image-size", "50"], "multiple"), (["hivit_nono"], "hivit_nano")],
)  # fmt: skip
def test_a_mistake_is_refused(arguments, part):
    done = CliRunner().invoke(app, ["benchmark", "leak", *arguments])
    assert isinstance(done.exception, InputError | RecipeError)
    assert part in str(done.exception)
