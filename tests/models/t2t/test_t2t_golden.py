"""T2T-ViT-14 agrees with recorded numbers of the released network, and with its front end written out."""

from __future__ import annotations

import math

import pytest
import torch
from drloc_golden import MODELS, excess, official, probe
from torch.nn import functional as F

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier
from vitpipe.models.convert import convert_state
from vitpipe.models.t2t.performer import Performer
from vitpipe.models.weights import load_into

T2T_14 = model_config({"name": "t2t_vit_14"})
ENTRY = MODELS["t2t_vit_14"]


@pytest.fixture(scope="module")
def network():
    found = build_classifier(T2T_14, num_classes=1000).eval()
    load_into(found, convert_state(official("t2t_vit_14")).state)
    return found


@torch.no_grad()
def test_levels_grid_and_logits_as_recorded(network):
    images, front = probe(2, 3, 224, 224), network.backbone.patch_embed
    ours = {}
    for name in ("attention1", "attention2"):
        layer = getattr(front, name)
        layer.register_forward_hook(lambda _, __, out, name=name: ours.update({f"after_{name}": out}))
    ours["tokens"] = front(images).flatten(2).transpose(1, 2)
    found = network.features(images, (0, -1))
    ours["block0"] = torch.cat([found.class_tokens[0].unsqueeze(1), found.tokens[0]], dim=1)
    grid = ours["grid_after_norm"] = network.location_grid(found)
    ours["grid_pool2x2_stride2"] = F.avg_pool2d(grid, 2)
    ours["grid_pool3x3_stride2_pad1_excl"] = F.avg_pool2d(grid, 3, 2, 1, count_include_pad=False)
    ours["logits"] = network.logits(found)
    recorded = ENTRY["recorded"]
    assert set(ours) == {name for name in recorded if not name.startswith("drloc_on")}
    excesses = {name: excess(tensor, recorded[name]) for name, tensor in ours.items()}
    assert max(excesses.values()) < 1, excesses
    assert torch.equal(grid, network.final_norm(found.tokens[-1]).mT.unflatten(2, (14, 14)))
    assert not torch.allclose(grid, found.maps()[-1], atol=0.01)


def test_parameters_and_cost_as_recorded(network):
    trained = sum(p.numel() for p in network.parameters())
    fixed = sum(b.numel() for b in network.buffers())
    assert trained == ENTRY["parameters"]["trainable_without_drloc"]
    assert trained + fixed == ENTRY["parameters"]["without_drloc"] == 21_545_550
    assert fixed == 79_744
    counted = ENTRY["macs_batch1_without_drloc"]["torch_flop_counter_macs"]
    assert measure_cost(lambda: build_classifier(T2T_14, num_classes=1000), 224).macs == counted


def _written_out(layer: Performer, x_BNC: torch.Tensor) -> torch.Tensor:
    """The performer of the specification, token by token, in float64."""
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    w = weights["random_features"]
    num_features, inner = w.shape

    def linear(name, x):
        return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def phi(x):
        return torch.stack([(row @ x - x @ x / 2).exp() for row in w]) / math.sqrt(num_features)

    images = []
    for x_NC in x_BNC.double():
        kqv = linear("kqv", norm("norm1", x_NC))
        k, q, v = kqv[:, :inner], kqv[:, inner : 2 * inner], kqv[:, 2 * inner :]
        tokens = []
        for query in q:
            shares = torch.stack([phi(query) @ phi(key) for key in k])
            tokens.append((shares[:, None] * v).sum(0) / (shares.sum() + 1e-8))
        out = v + linear("proj", torch.stack(tokens))
        hidden = linear("mlp.fc1", norm("norm2", out))
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        images.append(out + linear("mlp.fc2", gelu))
    return torch.stack(images)


@torch.no_grad()
def test_a_performer_is_the_one_of_the_paper():
    torch.manual_seed(0)
    layer = Performer(27, 8, 6).eval()
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 11, 27)
    torch.testing.assert_close(layer(x), _written_out(layer, x).float(), rtol=1e-5, atol=1e-5)
