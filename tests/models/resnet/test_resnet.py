"""ResNets give timm's and torchvision's numbers; initial values, draws, layers, conversion, transfer."""

from __future__ import annotations

import pytest
import torch
from drloc_golden import official, probe

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError, InputError
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.convert import convert_state
from vitpipe.models.draws import image_draws
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_into, save_weights
from vitpipe.optim.groups import parameter_groups

NANO = model_config({"name": "resnet_nano", "image_size": 64})
RESNET_50 = model_config({"name": "resnet50"})


def _usual_names(state):
    """torchvision's names of drloc's."""
    place = {"0": "conv1", "1": "bn1", **{str(n + 3): f"layer{n}" for n in range(1, 5)}}
    names = {}
    for name in state:
        _, number, rest = name.split(".", 2) if name.startswith("model.") else ("", "", "")
        names[name] = f"{place[number]}.{rest}" if number else name
    return {names[name]: tensor for name, tensor in state.items() if not name.startswith("drloc.")}


@torch.no_grad()
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_is_bit_identical_with_the_libraries(source):
    import timm
    import torchvision

    state = _usual_names(official("resnet50"))
    library = timm.create_model("resnet50") if source == "timm" else torchvision.models.resnet50()
    library.load_state_dict(state)
    network = build_classifier(RESNET_50, num_classes=1000)
    load_into(network, convert_state(official("resnet50")).state)
    images = probe(2, 3, 128, 160)
    library.eval()
    network.eval()
    assert torch.equal(network(images), library(images))
    found = network.features(images, range(16))
    assert found.grids[-1] == (4, 5)
    assert [tokens.shape[2] for tokens in found.tokens] == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert min(tokens.min() for tokens in found.tokens) == 0  # behind the ReLU
    if source == "timm":
        assert torch.equal(found.maps()[-1], library.forward_features(images))
    # The libraries' own files have the same names.
    assert set(convert_state(state).state) == set(network.state_dict())


def test_parameters_and_cost():
    cost = measure_cost(lambda: build_classifier(RESNET_50, num_classes=1000), 224)
    assert cost.params == 25_557_032
    assert round(cost.gmacs, 3) == 4.089


def test_initial_values_are_torchvisions():
    import torchvision

    torch.manual_seed(0)
    ours = build_classifier(RESNET_50, num_classes=1000).state_dict()
    theirs = torchvision.models.resnet50().state_dict()
    for name, tensor in theirs.items():
        name = name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.{name}"
        if tensor.ndim > 1:
            assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=0.03), name
        elif not name.startswith("head."):
            # No scale of a batch norm begins at 0.
            assert torch.equal(ours[name], tensor), name


def test_branches_drop_by_image():
    torch.manual_seed(0)
    network = build_encoder(NANO, drop_path=0.9).eval()
    for module in network.modules():
        if type(module).__name__ == "BranchDrop":
            module.train()
    ratios = [block.drop_path for layer in ("layer1", "layer2", "layer3", "layer4") for block in getattr(network.backbone, layer)]  # fmt: skip
    assert ratios[0] is None
    assert [drop.drop_ratio for drop in ratios[1:]] == pytest.approx([0.3, 0.6, 0.9])
    images, numbers = torch.randn(6, 3, 64, 64), torch.arange(6)

    def pooled(*parts):
        rows = []
        for part in parts:
            with image_draws(5, numbers[part]):
                rows.append(network.features(images[part]).pooled)
        return torch.cat(rows)

    whole = pooled(slice(0, 6))
    torch.testing.assert_close(pooled(slice(0, 2), slice(2, 6)), whole)
    assert not torch.allclose(network.eval().features(images).pooled, whole)


def test_layers_decay_and_refusals():
    network = build_classifier(NANO, num_classes=3)
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05, no_decay=network.no_decay)
    kept = {n for group in groups if not group["decays"] for n in group["names"]}
    assert kept == {n for n, parameter in network.named_parameters() if parameter.ndim == 1}
    layers = {"backbone.bn1.weight": 0, "backbone.layer1.0.bn3.bias": 1, "backbone.layer4.0.conv1.weight": 4}
    layers["head.bias"] = 5
    assert {name: network.layer_of(name) for name in layers} == layers
    full = build_encoder(RESNET_50)
    assert full.layer_of("backbone.layer3.5.conv1.weight") == 13
    assert (NANO.num_layers, RESNET_50.num_layers) == (network.num_layers, full.num_layers) == (6, 18)
    with pytest.raises(InputError, match="image of 31 x 64 pixels"):
        network.features(torch.zeros(1, 3, 31, 64))
    with pytest.raises(InputError, match="cannot give its attention"):
        network.features(torch.zeros(1, 3, 64, 64), attention=True)
    with pytest.raises(ValueError, match="multiple of 32"):
        model_config({"name": "resnet50", "image_size": 100})


@pytest.mark.parametrize("depth", ["resnet18", "resnet101"])
def test_other_depths_are_named_as_what_they_are(depth):
    import torchvision

    with torch.device("meta"):
        state = getattr(torchvision.models, depth)().state_dict()
    blocks = {"resnet18": "2-2-2-2", "resnet101": "3-4-23-3"}[depth]
    with pytest.raises(CheckpointError, match=rf"a ResNet of {blocks} blocks.*which vitpipe does not have"):
        convert_state(state)
    known = official("resnet50")
    with pytest.raises(CheckpointError, match=r"model\.4\.0\.se\.weight is not known"):
        convert_state({**known, "model.4.0.se.weight": torch.zeros(1)})


def test_transfer_between_encoders_and_classifiers(tmp_path):
    torch.manual_seed(0)
    network = build_classifier(NANO, num_classes=3)
    save_weights(network, tmp_path / "c.safetensors")
    assert str(describe(network.state_dict())) == "a classifier network of resnet_nano"
    assert transfer_weights(build_encoder(NANO), tmp_path / "c.safetensors").count("unused") == 2
    other = build_classifier(NANO, num_classes=4)
    assert transfer_weights(other, tmp_path / "c.safetensors").count("fresh") == 2
    save_weights(build_encoder(NANO), tmp_path / "e.safetensors")
    assert transfer_weights(network, tmp_path / "e.safetensors").count("missing") == 2
