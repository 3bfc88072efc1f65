"""Target and loss of masked pre-training compared with recorded values of the released code; properties."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vitpipe.config.recipe import DecoderConfig, ModelConfig, PyramidConfig
from vitpipe.data.batches import Batch
from vitpipe.methods.masked_pixels import MaskedPixels, images_of, masked_error, normalised_units
from vitpipe.methods.method import Draw
from vitpipe.models.build import build_pretrainer
from vitpipe.models.convert import convert_state
from vitpipe.models.masking import patchify
from vitpipe.models.weights import load_into

GOLDEN = Path(__file__).parent.parent / "golden"
NANO = ModelConfig(
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


def _batch(num_images=4, chunk=0):
    images = torch.randn(num_images, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    return Batch(images, torch.zeros(num_images).long(), torch.arange(num_images), 0, 0, chunk)


def test_the_target_is_the_released_one(fill):
    recorded = json.loads((GOLDEN / "itpn.json").read_text())["pixel_target"]
    images = fill.probe((2, 3, 224, 224), recorded["image_probe_seed"])
    digest = fill.digest(normalised_units(images))
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
        model = build_pretrainer(ModelConfig(name="hivit_base"))
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
    assert torch.equal(normalised_units(torch.full((1, 3, 16, 16), 7.0)), torch.zeros(1, 1, 768))


def test_only_masked_units_count():
    pred, target = torch.zeros(2, 4, 768), torch.ones(2, 4, 768)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1]])
    target[mask == 0] = 100.0
    assert masked_error(pred, target, mask).item() == 1.0
    target[0, 0] = 3.0
    assert masked_error(pred, target, mask).item() == pytest.approx((9 + 3) / 4)


def test_hidden_pixels_do_not_affect_the_prediction():
    method, batch = _nano().eval(), _batch()
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = method.model(batch.images_BCHW, noise)
        hidden = F.interpolate(before.mask_BN.view(4, 1, 4, 4), scale_factor=16)
        changed = batch.images_BCHW + 10 * hidden * torch.randn_like(batch.images_BCHW)
        after = method.model(changed, noise)
    assert hidden.mean() == 0.75
    assert torch.equal(before.pred_BND, after.pred_BND)


def test_the_mask_is_a_function_of_the_draw():
    method, batch = _nano(), _batch()
    draws = [Draw(0, 3, 1), Draw(0, 3, 1), Draw(0, 3, 2), Draw(0, 4, 1), Draw(1, 3, 1)]
    losses = [method(batch, draw)["loss"].item() for draw in draws]
    assert losses[0] == losses[1]
    assert len(set(losses[1:])) == 4


def test_training_reduces_the_loss():
    method, batch = _nano(), _batch(8)
    smooth = F.interpolate(torch.randn(8, 3, 2, 2), size=64, mode="bilinear")
    batch = batch._replace(images_BCHW=smooth)
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for step in range(90):
        loss = method(batch, Draw(0, step, 0))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
