"""RevColV2: parameter and FLOP counts, gradients, masks, invalid input."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitpipe.contracts.errors import InputError
from vitpipe.models.masking import choose_units, patchify
from vitpipe.models.revcolv2.columns import SHAPES, RevColV2Shape
from vitpipe.models.revcolv2.dense_maps import RevColV2Dense
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer
from vitpipe.models.revcolv2.revcolv2_classifier import RevColV2Classifier

GOLDEN = Path(__file__).parents[2] / "golden" / "revcolv2.json"
COUNTS = [entry for entry in json.loads(GOLDEN.read_text())["entries"] if entry["kind"] == "v2_counts"]
TINY = RevColV2Shape("tiny", width=24, num_heads=3, depth=2)
MODES = ["plain", "column", "reversible"]


def _backbone(shape=TINY, **options):
    torch.manual_seed(0)
    return RevColV2(shape, **{"image_size": 64, **options})


def _gradients(model, mode, loss, *, seed=3):
    model.backbone.memory.requested = mode
    model.zero_grad()
    torch.manual_seed(seed)
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _difference(ours, plain):
    assert set(ours) == set(plain)
    off = math.sqrt(sum((ours[name] - plain[name]).square().sum().item() for name in plain))
    return off / math.sqrt(sum(grad.square().sum().item() for grad in plain.values()))


def _pixel_loss(model, images, noise):
    prediction = model(images, noise)
    error = (prediction.pred_BND - patchify(images)).square().mean(-1)
    return (error * prediction.mask_BN).sum() / prediction.mask_BN.sum()


# Counts


def _gmacs(function, *inputs):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 2e9


def _closed_form(shape, num_tokens, num_classes):
    """Parameters and multiply-adds of the whole network, from its sizes alone."""
    width, blocks = shape.width, 4 * shape.depth * shape.num_columns
    links = 3 + 6 * (shape.num_bottom_up - 1) + 6 * shape.num_top_down
    params = blocks * (12 * width**2 + 13 * width) + links * (width**2 + 3 * width)
    params += 4 * width * (shape.num_columns - 1) + 769 * width + 2 * 196 * width + 2 * width
    params += num_classes * (width + 1)
    macs = blocks * (12 * width**2 * num_tokens + 2 * num_tokens**2 * width)
    macs += links * width**2 * num_tokens + 768 * width * num_tokens + num_classes * width
    return params, macs


@pytest.mark.parametrize("entry", COUNTS, ids=[entry["model"] for entry in COUNTS])
def test_counts(entry):
    shape = SHAPES[entry["model"]]
    with torch.device("meta"):
        backbone, images = RevColV2(shape, image_size=224), torch.empty(1, 3, 224, 224)
        model = RevColV2Classifier(backbone, 1000)
    sizes = {"blocks": 0, "links": 0, "gamma": 0, "patch_embed": 0, "position": 0, "head": 0}
    for name, parameter in model.named_parameters():
        kinds = {"blocks": r"\.blocks\.", "links": r"\.(down|up)\.", "gamma": r"\.gamma\.",
                 "patch_embed": r"patch_embed", "position": r"pos_embed", "head": r"^head\."}  # fmt: skip
        (kind,) = [kind for kind, pattern in kinds.items() if re.search(pattern, name)]
        sizes[kind] += parameter.numel()
    assert sizes == entry["breakdown_params"]
    assert sum(sizes.values()) == entry["params"]
    full = _gmacs(lambda x: model.head(backbone(x)[-1].mean(dim=(1, 2))), images)
    assert full == pytest.approx(entry["gmacs_full"], abs=1e-12)
    assert _gmacs(model, images) == pytest.approx(entry["gmacs_needed_for_top_level"], abs=1e-12)
    assert _closed_form(shape, 196, 1000) == (entry["params"], round(entry["gmacs_full"] * 1e9))
    assert sum(sizes.values()) / 1e6 == pytest.approx(entry["published"]["params_m"], rel=0.03)
    assert full == pytest.approx(entry["published"]["gflops"], rel=0.03)
    probe = {"revcolv2_base": 9.35, "revcolv2_large": 33.2}[entry["model"]]
    assert _gmacs(model.frozen_features, images) == pytest.approx(probe, rel=2e-3)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(depth=st.integers(1, 2), bottom_up=st.integers(1, 3), top_down=st.integers(1, 3))
def test_the_closed_form_counts_any_size(depth, bottom_up, top_down):
    shape = RevColV2Shape("any", 16, 2, depth, bottom_up, top_down)
    with torch.device("meta"):
        model = RevColV2Classifier(RevColV2(shape, image_size=224), 10)
        images = torch.empty(1, 3, 224, 224)
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = _gmacs(lambda x: model.head(model.backbone(x)[-1].mean(dim=(1, 2))), images) * 1e9
    assert (params, round(macs)) == _closed_form(shape, 196, 10)


# Gradients


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("bottom_up", "top_down"), [(1, 1), (2, 2), (3, 3)])
def test_pretraining_gradients(dtype, limit, bottom_up, top_down):
    shape = replace(TINY, num_bottom_up=bottom_up, num_top_down=top_down)
    model = RevColV2Pretrainer(_backbone(shape, drop_path=0.3, trainable_positions=True), 0.6).to(dtype)
    images, noise = torch.randn(3, 3, 64, 64, dtype=dtype), torch.rand(3, 16)
    plain, column, reversible = (
        _gradients(model, mode, lambda: _pixel_loss(model, images, noise)) for mode in MODES
    )
    assert set(plain) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(column[name], plain[name]) for name in plain)
    difference = _difference(reversible, plain)
    print(f"{bottom_up}+{top_down} {dtype}: {difference:.1e}")
    assert 0 < difference < limit


def test_every_parameter_gets_a_gradient_in_pretraining():
    model = RevColV2Pretrainer(_backbone(trainable_positions=True), 0.6)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    found = _gradients(model, "reversible", lambda: _pixel_loss(model, images, noise))
    assert {name for name, grad in found.items() if grad.any()} == set(dict(model.named_parameters()))


def test_pretraining_under_autocast():
    model = RevColV2Pretrainer(_backbone(drop_path=0.3), 0.6)
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 16)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return _pixel_loss(model, images, noise)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {mode: _gradients(model, mode, loss) for mode in ("plain", "column", "auto")}
    for mode in ("column", "auto"):
        assert all(torch.equal(found[mode][name], found["plain"][name]) for name in found["plain"])
    with pytest.warns(RuntimeWarning, match="not accurate under autocast"):
        safe = _gradients(model, "reversible", loss)
    assert all(torch.equal(safe[name], found["plain"][name]) for name in safe)
    model.backbone.memory.allow_reversible_amp = True
    off = _difference(_gradients(model, "reversible", loss), found["plain"])
    print(f"reversible under bfloat16: {off:.1e}")
    assert 0 < off < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["column", "reversible"])
def test_micro_batches_and_two_processes_give_the_gradients_of_one(mode, tmp_path):
    whole = two_ranks.gradients_of("plain", micro_batch=4)
    assert _difference(two_ranks.gradients_of(mode, micro_batch=1), whole) < 1e-12
    if mode == "reversible":
        for gradients in two_ranks.gradients_of_two(tmp_path, mode):
            assert _difference(gradients, whole) < 1e-12


def test_kept_memory_does_not_grow_with_the_columns():
    kept = []
    for num_columns in (1, 2, 4):
        shape = replace(TINY, num_bottom_up=num_columns, num_top_down=num_columns)
        model = RevColV2Pretrainer(_backbone(shape, memory_mode="reversible"), 0.75)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {}

        def keep(tensor, storages=storages, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(torch.randn(2, 3, 64, 64), torch.rand(2, 16))
        assert out.pred_BND.requires_grad
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[0] == kept[1] == kept[2]


def test_windowed_gradients_are_reversible():
    model = RevColV2Dense(_backbone(window=3, drop_path=0.2), "segment").double()
    images = torch.randn(2, 3, 64, 80).double()
    plain, _, reversible = (
        _gradients(model, mode, lambda: sum(x.square().mean() for x in model(images))) for mode in MODES
    )
    assert _difference(reversible, plain) < 1e-12


def test_the_inverse_of_the_base_size():
    backbone = _backbone(SHAPES["revcolv2_base"], image_size=224)
    error = backbone.inverse_error(torch.randn(1, 3, 224, 224))
    print(f"rebuilt states of revcolv2_base: {error:.1e}")
    assert 0 < error < 1e-4


def test_inverse_error_has_no_effect_on_training():
    model = RevColV2Pretrainer(_backbone(drop_path=0.3), 0.5)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)

    def loss(watched=False):
        with torch.autocast("cpu", torch.bfloat16):
            if watched:
                model.backbone.inverse_error(images)
            return _pixel_loss(model, images, noise)

    plain, watched = (_gradients(model, "column", lambda w=w: loss(w)) for w in (False, True))
    assert set(watched) == set(plain)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


def test_small_gammas_give_a_warning_and_plain_gradients():
    model = RevColV2Classifier(_backbone(), 5)
    model.backbone.bottom_up[1].gamma[2].data[3] = 0.01
    images = torch.randn(2, 3, 64, 64)
    plain = _gradients(model, "plain", lambda: model(images).square().sum())
    with pytest.warns(RuntimeWarning, match="0.01"):
        ours = _gradients(model, "reversible", lambda: model(images).square().sum())
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


# Masks


def test_hidden_pixels_are_not_seen():
    model = RevColV2Pretrainer(_backbone(), 0.6).eval()
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    first = model(images, noise)
    assert first.pred_BND.shape == (2, 16, 768)
    assert first.mask_BN.sum(dim=1).tolist() == [10, 10]
    units = F.interpolate(first.mask_BN.view(2, 1, 4, 4), scale_factor=16)
    changed = model(images + 100 * torch.randn_like(images) * units, noise)
    assert torch.equal(first.pred_BND, changed.pred_BND)
    seen = model(images + 0.1 * (1 - units), noise)
    assert not torch.allclose(first.pred_BND, seen.pred_BND)


def test_the_order_of_the_seen_units_does_not_matter():
    model = RevColV2Pretrainer(_backbone(), 0.5).double().eval()
    images, noise = torch.randn(2, 3, 64, 64).double(), torch.rand(2, 16)
    first, mask = model(images, noise), choose_units(noise, 0.5).mask_BN
    # The same units seen, in the opposite order.
    second = model(images, torch.where(mask == 0, -noise, noise))
    assert torch.equal(second.mask_BN, mask)
    assert not torch.equal(first.kept_BK, second.kept_BK)
    torch.testing.assert_close(first.pred_BND, second.pred_BND)


def test_unmasked_states_take_the_same_path():
    backbone = _backbone().double().eval()
    x = backbone.embed(torch.randn(2, 3, 64, 64).double())
    tokens = backbone.encode(x.flatten(1, 2))
    for as_tokens, as_map in zip(tokens, backbone.encode(x), strict=True):
        torch.testing.assert_close(as_tokens, as_map.flatten(1, 2))
    joined = backbone.join(backbone.encode(x))
    model = RevColV2Pretrainer(backbone, 0.5).double()
    place = torch.arange(16).repeat(2, 1)
    for state, map_state in zip(tokens, joined, strict=True):
        filled = model._fill(state, model.mask_token[0], place)
        torch.testing.assert_close(filled, map_state.flatten(1, 2))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.99, 1.0, -1.0])
def test_masks_that_hide_everything_or_nothing(mask_ratio):
    with pytest.raises(InputError, match="mask_ratio"):
        RevColV2Pretrainer(_backbone(), mask_ratio)


def test_bad_input():
    with pytest.raises(InputError, match="multiple of 16"):
        _backbone(image_size=50)
    with pytest.raises(InputError, match="40 x 64"):
        _backbone()(torch.zeros(1, 3, 40, 64))
    for columns in ((0, 2), (2, 0)):
        with pytest.raises(InputError, match="too few"):
            _backbone(RevColV2Shape("none", 24, 3, 1, *columns))
    with pytest.raises(InputError, match="5 heads"):
        _backbone(replace(TINY, num_heads=5))
    model = RevColV2Pretrainer(_backbone(), 0.5)
    with pytest.raises(InputError, match="16 units"):
        model(torch.zeros(1, 3, 32, 32), torch.rand(1, 4))
    with pytest.raises(InputError, match="noise is for 9 units"):
        model(torch.zeros(1, 3, 64, 64), torch.rand(1, 9))
