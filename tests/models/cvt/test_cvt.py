"""CvT compared with its specification written out; norms that decay, sizes, layers, transfer."""

from __future__ import annotations

import math

import pytest
import torch
from drloc_golden import official, probe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError, InputError
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.convert import convert_state
from vitpipe.models.cvt.cvt import ChannelNorm
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_into, save_weights
from vitpipe.optim.groups import parameter_groups

NANO = model_config({"name": "cvt_nano", "image_size": 64})
CVT_13 = model_config({"name": "cvt_13"})
STAGES = ((7, 4, 3, 1, 1), (3, 2, 1, 2, 3), (3, 2, 1, 10, 6))  # kernel, stride, padding, blocks, heads


def _norm(x, g, b):
    mean = x.mean(1, keepdim=True)
    deviation = (x - mean).square().mean(1, keepdim=True).sqrt()
    return (x - mean) / (deviation + 1e-5) * g + b


def _projection(state, start, x, stride):
    x = F.conv2d(x, state[f"{start}.0.weight"], stride=stride, padding=1, groups=x.shape[1])
    mean, var = state[f"{start}.1.running_mean"], state[f"{start}.1.running_var"]
    scale = state[f"{start}.1.weight"] / (var + 1e-5).sqrt()
    x = (x - mean[:, None, None]) * scale[:, None, None] + state[f"{start}.1.bias"][:, None, None]
    return torch.einsum("oc,bchw->bohw", state[f"{start}.2.weight"][:, :, 0, 0], x)


def _pointwise(state, start, x):
    weight, bias = state[f"{start}.weight"][:, :, 0, 0], state[f"{start}.bias"]
    return torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]


def _written_out(state, images):
    """Last map and logits of the specification, by official names."""
    x = images
    for stage, (_, stride, padding, blocks, heads) in enumerate(STAGES):
        start = f"layers.{stage}"
        x = F.conv2d(x, state[f"{start}.0.weight"], state[f"{start}.0.bias"], stride, padding)
        x = _norm(x, state[f"{start}.1.g"], state[f"{start}.1.b"])
        for block in range(blocks):
            inner = f"{start}.2.layers.{block}"
            y = _norm(x, state[f"{inner}.0.norm.g"], state[f"{inner}.0.norm.b"])
            q = _projection(state, f"{inner}.0.fn.to_q.net", y, 1)
            k, v = _projection(state, f"{inner}.0.fn.to_kv.net", y, 2).chunk(2, dim=1)
            outs = []
            for h in range(heads):
                part = slice(64 * h, 64 * (h + 1))
                qh, kh, vh = (t[:, part].flatten(2) for t in (q, k, v))
                shares = (torch.einsum("bcn,bcm->bnm", qh, kh) / math.sqrt(64)).softmax(-1)
                outs.append(torch.einsum("bnm,bcm->bcn", shares, vh))
            y = torch.cat(outs, dim=1).unflatten(2, x.shape[2:])
            x = x + _pointwise(state, f"{inner}.0.fn.to_out.0", y)
            y = _norm(x, state[f"{inner}.1.norm.g"], state[f"{inner}.1.norm.b"])
            y = _pointwise(state, f"{inner}.1.fn.net.0", y)
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            x = x + _pointwise(state, f"{inner}.1.fn.net.3", y)
    return x, x.mean((2, 3)) @ state["head.weight"].t() + state["head.bias"]


@torch.no_grad()
def test_agrees_with_the_specification_written_out():
    state = official("cvt_13")
    network = build_classifier(CVT_13, num_classes=1000).eval()
    load_into(network, convert_state(state).state)
    for size in (224, 96):
        images = probe(1, 3, size, size)
        found = network.features(images)
        grid, logits = _written_out(state, images)
        assert found.grids == ((size // 16, size // 16),)
        for ours, expected in ((found.maps()[-1], grid), (network.logits(found), logits)):
            assert ((ours - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_parameters_and_cost_as_measured_of_the_released_code():
    cost = measure_cost(lambda: build_classifier(CVT_13, num_classes=1000), 224)
    assert cost.params == 19_936_296
    fewer = measure_cost(lambda: build_classifier(CVT_13, num_classes=100), 224)
    assert round(fewer.gmacs, 3) == 4.543


def test_norms_decay_as_in_the_official_grouping():
    """Gains and offsets of the norms have four dimensions; batch norms and biases have one and are exempt."""
    network = build_classifier(NANO, num_classes=3)
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05, no_decay=network.no_decay)
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    norms = {name for name in decays if name.endswith((".g", ".b"))}
    assert len(norms) == 2 * (3 + 2 * network.num_blocks)
    assert all(decays[name] for name in norms)
    vectors = {name for name, parameter in network.named_parameters() if parameter.ndim == 1}
    assert {name for name in decays if not decays[name]} == vectors


@torch.no_grad()
def test_a_norm_adds_epsilon_to_the_deviation_and_works_in_float32():
    norm = ChannelNorm(6)
    x = 1e-5 * torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(norm(x), _norm(x, norm.g, norm.b))
    assert norm(x).std() < 0.8  # of the size of epsilon
    assert norm(x.bfloat16()).dtype == torch.float32
    with torch.enable_grad():
        flat = torch.ones(1, 6, 2, 2, requires_grad=True)
        norm(flat).sum().backward()
    assert flat.grad.isfinite().all()


@settings(max_examples=10, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70))
def test_every_size_works(height, width):
    torch.manual_seed(0)
    network = build_encoder(NANO).eval()
    with torch.no_grad():
        found = network.features(torch.randn(2, 3, height, width), range(network.num_blocks))
    expected = [tuple(-(-side // stride) for side in (height, width)) for stride in (4, 8, 16, 16)]
    assert list(found.grids) == expected
    torch.testing.assert_close(found.tokens[-1].mean(1), found.pooled)
    assert torch.equal(network.final_norm(found.tokens[-1]), found.tokens[-1])


def test_what_there_is_not_is_refused():
    network = build_encoder(NANO)
    with pytest.raises(InputError, match="image of 15 x 64 pixels"):
        network.features(torch.zeros(1, 3, 15, 64))
    with pytest.raises(InputError, match="cannot give its attention"):
        network.features(torch.zeros(1, 3, 64, 64), attention=True)
    assert network.image_attention(torch.zeros(1, 3, 64, 64)) is None
    state = official("cvt_13")
    with pytest.raises(CheckpointError, match=r"layers\.0\.2\.layers\.0\.0\.fn\.extra is not known"):
        convert_state({**state, "layers.0.2.layers.0.0.fn.extra": torch.zeros(1)})
    short = {name: t for name, t in state.items() if not name.startswith("layers.2.2.layers.9.")}
    with pytest.raises(CheckpointError, match="CvT of no known size"):
        convert_state(short)


def test_layers_drop_path_and_transfer(tmp_path):
    torch.manual_seed(0)
    network = build_classifier(NANO, num_classes=3, drop_path=0.3)
    ratios = [block.drop_ratio for stage in network.backbone.stages for block in stage.blocks]
    assert ratios == pytest.approx([0.0, 0.1, 0.2, 0.3])
    start = "backbone.stages"
    layers = {"0.embed.bias": 0, "0.norm.g": 0, "0.blocks.0.fc1.bias": 1, "1.embed.bias": 1, "2.norm.b": 2}
    layers["2.blocks.1.norm1.g"] = 4
    assert {name: network.layer_of(f"{start}.{name}") for name in layers} == layers
    assert network.layer_of("head.weight") == 5 == NANO.num_layers - 1
    save_weights(network, tmp_path / "c.safetensors")
    assert str(describe(network.state_dict())) == "a classifier network of cvt_nano"
    assert transfer_weights(build_encoder(NANO), tmp_path / "c.safetensors").count("unused") == 2
    other = build_classifier(NANO, num_classes=4)
    assert transfer_weights(other, tmp_path / "c.safetensors").count("fresh") == 2
    assert transfer_weights(network, tmp_path / "c.safetensors").count("matched") == len(network.state_dict())
