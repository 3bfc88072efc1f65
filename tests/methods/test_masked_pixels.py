"""Target and loss of masked pre-training compared with recorded values of the released code; properties."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.masked_pixels.config import MaskedPixelsConfig
from vitpipe.methods.masked_pixels.method import MaskedPixels, unit_error
from vitpipe.models.build import build_pretrainer
from vitpipe.models.convert import convert_state
from vitpipe.models.hivit.config import DecoderConfig, HiViTConfig, PyramidConfig
from vitpipe.models.masking import images_of, patchify
from vitpipe.models.pixel_target import normalised_target
from vitpipe.models.weights import load_into

GOLDEN = Path(__file__).parent.parent / "golden"
NANO = HiViTConfig(
    name="hivit_nano",
    image_size=64,
    pyramid=PyramidConfig(width=32),
    decoder=DecoderConfig(width=32, depth=1, heads=2),
)


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("golden_fill_methods", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nano():
    torch.manual_seed(0)
    return MaskedPixels(build_pretrainer(NANO))


def _batch(num_images=4, seed=0, step=0, first=0):
    images = torch.randn(num_images, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    indices = torch.arange(num_images) + first
    return Batch((images,), torch.zeros(num_images).long(), indices, Moment(seed, step, 90, 9))


def test_the_target_is_the_released_one(fill):
    recorded = json.loads((GOLDEN / "itpn.json").read_text())["pixel_target"]
    images = fill.probe((2, 3, 224, 224), recorded["image_probe_seed"])
    digest = fill.digest(normalised_target(images).units_BND)
    assert digest["shape"] == recorded["normalised"]["shape"]
    assert digest["values"] == pytest.approx(recorded["normalised"]["values"], abs=1e-5)
    assert digest["std"] == pytest.approx(recorded["normalised"]["std"], rel=1e-6)


@pytest.mark.parametrize("variant", ["outputs", "outputs_post_fill"])
def test_the_loss_of_the_base_network_is_the_released_one(fill, variant):
    numbers = json.loads((GOLDEN / "itpn.json").read_text())
    entry = next(e for e in numbers["entries"] if e["model"] == "pixel_base_pretrain")
    keys = json.loads((GOLDEN / "keys" / "itpn_pixel_base_pretrain.json").read_text())["keys"]
    state = fill.fill({name: torch.zeros(shape) for name, shape in keys.items()})
    for rule in numbers["post_fill"] if variant == "outputs_post_fill" else ():
        for name in (n for n in state if n.endswith(rule["key_endswith"])):
            state[name].mul_(rule["value"]) if rule["op"] == "mul" else state[name].add_(rule["value"])
    with torch.device("meta"):
        model = build_pretrainer(HiViTConfig(name="hivit_base"))
    model = model.to_empty(device="cpu")
    load_into(model, convert_state(state).state)

    image, noise = entry["input"]["image"], entry["input"]["noise"]
    images = fill.probe(tuple(image["shape"]), image["probe_seed"])
    noise_BN = torch.rand(
        noise["shape"], generator=torch.Generator().manual_seed(noise["uniform01_generator_seed"])
    )
    with torch.no_grad():
        loss = MaskedPixels(model).loss_of(images, noise_BN)
    assert loss.item() == pytest.approx(entry[variant]["loss"], rel=1e-5)


def test_images_of_inverts_patchify():
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(images_of(patchify(images), rows=2, columns=3), images)


def test_a_flat_unit_has_target_zero():
    assert torch.equal(normalised_target(torch.full((1, 3, 16, 16), 7.0)).units_BND, torch.zeros(1, 1, 768))


@pytest.mark.parametrize("by", ["unit", "image"])
def test_the_target_can_be_undone(by):
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 3 + 1
    target = normalised_target(images, by)
    pixels = target.units_BND * target.spread + target.mean
    torch.testing.assert_close(images_of(pixels, rows=2, columns=3), images)
    means = target.units_BND.mean(dim=-1) if by == "unit" else target.units_BND.mean(dim=(1, 2))
    torch.testing.assert_close(means, torch.zeros_like(means), rtol=0, atol=1e-5)
    spread = target.units_BND.flatten(1).std(dim=1)
    torch.testing.assert_close(spread, torch.ones(2), rtol=0, atol=1e-5 if by == "image" else 2e-3)


def test_options_choose_target_and_counted_units():
    batch, noise = _batch(), torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    model = _nano().model
    losses = {
        (norm, on): MaskedPixels(model, MaskedPixelsConfig(target_norm=norm, loss_on=on)).loss_of(
            batch.images, noise
        )
        for norm in ("unit", "image")
        for on in ("masked", "all")
    }
    prediction = model(batch.images, noise)
    error = (prediction.pred_BND - normalised_target(batch.images, "image").units_BND).square().mean(dim=-1)
    torch.testing.assert_close(losses["image", "all"], error.mean())
    torch.testing.assert_close(losses["image", "masked"], error[prediction.mask_BN == 1].mean())
    assert len({float(loss) for loss in losses.values()}) == 4


def test_only_masked_units_count():
    pred, target = torch.zeros(2, 4, 768), torch.ones(2, 4, 768)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1]])
    target[mask == 0] = 100.0
    assert unit_error(pred, target, mask).item() == 1.0
    target[0, 0] = 3.0
    assert unit_error(pred, target, mask).item() == pytest.approx((9 + 3) / 4)


def test_hidden_pixels_do_not_affect_the_prediction():
    method, batch = _nano().eval(), _batch()
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = method.model(batch.images, noise)
        hidden = F.interpolate(before.mask_BN.view(4, 1, 4, 4), scale_factor=16)
        changed = batch.images + 10 * hidden * torch.randn_like(batch.images)
        after = method.model(changed, noise)
    assert hidden.mean() == 0.75
    assert torch.equal(before.pred_BND, after.pred_BND)


def test_the_mask_is_a_function_of_seed_step_and_image():
    method, places = _nano(), [(0, 3, 1), (0, 3, 1), (0, 3, 2), (0, 4, 1), (1, 3, 1)]
    losses = [method(_batch(4, *place))["loss"].item() for place in places]
    assert losses[0] == losses[1]
    assert len(set(losses[1:])) == 4
    whole = method.noise(_batch(4), "mask")
    assert torch.equal(method.noise(_batch(1, first=2), "mask"), whole[2:3])


def test_training_reduces_the_loss():
    method, batch = _nano(), _batch(8)
    smooth = F.interpolate(torch.randn(8, 3, 2, 2), size=64, mode="bilinear")
    batch = batch._replace(views=(smooth,))
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for step in range(90):
        loss = method(batch._replace(moment=Moment(0, step, 90, 9)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
