"""Swin as dense features: mmdetection's network at any size, a classifier's weights, layers, decay, drop path."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vitpipe.config.model import model_config
from vitpipe.config.read import load_recipe
from vitpipe.dense.backbone import NET_PREFIX
from vitpipe.models.build import build_classifier, build_dense, build_encoder
from vitpipe.models.draws import image_draws
from vitpipe.models.swin.swin import BranchDrop
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state, save_weights

NANO, TINY = (model_config({"name": name}) for name in ("swin_nano", "swin_tiny"))
TABLE = "attn.relative_position_bias_table"
ENDS = (1, 3, 9, 11)  # the last block of each stage


def _drawn(network, seed=0):
    """Not as initialised, where all norms and biases are the same: a mistaken place of theirs changes the maps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            about = 0.5 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(about + 0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def _of_mmdetection(state):
    """Our state under mmdetection's names, its merges in the order of `nn.Unfold`."""
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("norms."):
            theirs[name.replace("norms.", "norm")] = tensor
            continue
        name = name.removeprefix("backbone.").replace("patch_embed.proj", "patch_embed.projection")
        if found := re.fullmatch(r"layers\.(\d)\.downsample\.(.+)", name):
            # Neighbours (0, 0), (1, 0), (0, 1), (1, 1), each with C channels > C times four in rows.
            parts = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
            theirs[f"stages.{int(found[1]) - 1}.downsample.{found[2]}"] = parts.transpose(-1, -2).flatten(-2)
            continue
        name = name.replace("layers.", "stages.").replace(".attn.", ".attn.w_msa.")
        theirs[name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")] = tensor
    return theirs


@pytest.fixture(scope="module")
def pair():
    """Our maps and mmdetection's network with the same weights, in evaluation."""
    from vitpipe.dense.mm_import import open_detection

    open_detection()
    from mmdet.models.backbones.swin import SwinTransformer

    ours, theirs = _drawn(build_dense(TINY, "detect", image_size=224)), SwinTransformer(drop_path_rate=0.0)
    found = theirs.load_state_dict(_of_mmdetection(ours.state_dict()), strict=False)
    assert not found.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in found.missing_keys)
    theirs.eval()  # returns None
    return ours, theirs


@pytest.mark.dense
@pytest.mark.parametrize("size", [(224, 224), (96, 352), (101, 190), (32, 32)])
@torch.no_grad()
def test_the_maps_are_those_of_mmdetection(pair, size):
    """Whole windows, windows that have to be padded, a padded patch, and grids within one window."""
    ours, theirs = pair
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(images)
    for found, known in zip(ours(images), expected, strict=True):
        assert found.shape == known.shape
        torch.testing.assert_close(found, known, rtol=0, atol=3e-6 * known.abs().max().item())


@pytest.mark.dense
def test_gradients_are_those_of_mmdetection(pair):
    ours, theirs = pair
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    for network in pair:
        network.zero_grad()
        sum(x.square().mean() for x in network(images)).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, known in _of_mmdetection({name: p.grad for name, p in ours.named_parameters()}).items():
        limit = 1e-5 * max(known.abs().max().item(), 1e-6)
        torch.testing.assert_close(gradients[name], known, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("has_head", [True, False], ids=["classifier", "encoder"])
@torch.no_grad()
def test_a_classifiers_weights_give_its_first_three_stages(has_head, tmp_path):
    """The last stage differs: there the classifier's windows do not shift (its grid is one window)."""
    source = _drawn(build_classifier(TINY, num_classes=5) if has_head else build_encoder(TINY))
    save_weights(source, tmp_path / "w.safetensors")
    network = build_dense(TINY, "segment", image_size=512).eval()
    report = transfer_weights(network, tmp_path / "w.safetensors")
    outcomes = {row.source or row.target: row.outcome for row in report.rows}
    norms = {f"norms.{stage}.{kind}" for stage in range(4) for kind in ("weight", "bias")}
    assert {name for name, outcome in outcomes.items() if outcome == "missing"} == norms
    unused = {"backbone.norm.weight", "backbone.norm.bias"}
    unused |= {"head.weight", "head.bias"} if has_head else set()
    assert {name for name, outcome in outcomes.items() if outcome == "unused"} == unused
    assert set(outcomes.values()) == {"missing", "unused", "matched"}
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in network.norms)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    maps = source.features(images, ENDS).maps()
    normed = [
        norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for norm, x_BCHW in zip(network.norms, maps, strict=True)
    ]
    found = network(images)
    for ours, theirs in zip(found[:3], normed[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * theirs.abs().max().item())
    assert not torch.allclose(found[3], normed[3], rtol=0, atol=1e-4 * normed[3].abs().max().item())


def test_tables_of_smaller_windows_are_resized_and_the_maps_own_weights_are_known(tmp_path):
    """At 64 pixels the last stage of swin_nano has one window of 2 tokens; maps have windows of 4 everywhere."""
    save_weights(_drawn(build_encoder(NANO)), tmp_path / "w.safetensors")
    network = build_dense(NANO, "detect", image_size=64)
    report = transfer_weights(network, tmp_path / "w.safetensors")
    resized = [row.target for row in report.rows if row.outcome == "resized"]
    assert resized == [f"backbone.layers.3.blocks.0.{TABLE}"]
    save_weights(network, tmp_path / "maps.safetensors")
    info = describe(load_state(tmp_path / "maps.safetensors"))
    assert (info.kind, info.model) == ("pyramid", "swin_nano")
    again = transfer_weights(build_dense(NANO, "detect", image_size=64), tmp_path / "maps.safetensors")
    assert again.count("matched") == len(again.rows)


@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("size", [(64, 64), (128, 160), (96, 132)])
def test_the_smallest_network_takes_any_size(task, size):
    network = build_dense(NANO, task, image_size=64)
    rows, columns = size
    for stride, (width, x_BCHW) in enumerate(
        zip(network.widths, network(torch.randn(1, 3, rows, columns)), strict=True)
    ):
        side = 4 * 2**stride
        assert x_BCHW.shape == (1, width, -(-rows // side), -(-columns // side))


@torch.no_grad()
def test_shifted_windows_join_what_lies_apart():
    """A change in one corner reaches the whole image through shifts and merges, and not where masks forbid it."""
    network = _drawn(build_dense(NANO, "segment", image_size=64))
    images = torch.randn(1, 3, 100, 100, generator=torch.Generator().manual_seed(4))
    changed = images.clone()
    changed[..., :4, :4] += 1.0
    moved = (network(images)[0] - network(changed)[0]).abs().amax(1)[0] > 0
    # Two blocks of windows of 4, shifted by 2: rows and columns below 6, of 25. Without masks the corner
    # would meet the last rows, which the shift brings beside it.
    assert moved[:6, :6].any()
    assert not moved[6:].any()
    assert not moved[:, 6:].any()


def test_layers_and_drop_path():
    network = build_dense(TINY, "detect", image_size=224, drop_path=0.2)
    assert network.num_layers == 14
    assert network.head_layer == 13
    layers = {name: network.layer_of(name) for name, _ in network.named_parameters()}
    assert layers["backbone.patch_embed.norm.weight"] == 0
    assert [layers[f"norms.{stage}.bias"] for stage in range(4)] == [2, 4, 10, 12]
    assert layers["backbone.layers.2.downsample.norm.weight"] == 4
    assert layers["backbone.layers.3.blocks.1.mlp.fc2.weight"] == 12
    drops = [m for m in network.modules() if isinstance(m, BranchDrop)]
    ratios = [number * 0.2 / 11 for number in range(1, 12) for _ in range(2)]
    assert [drop.drop_ratio for drop in drops] == pytest.approx(ratios)


def test_dropped_branches_do_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    network = build_dense(NANO, "segment", image_size=64, drop_path=0.9).train()
    images, indices = torch.randn(4, 3, 64, 64), torch.tensor([4, 9, 1, 7])

    def last(*parts):
        found = []
        for part in parts:
            with image_draws(11, indices[part]):
                found.append(network(images[part])[-1])
        return torch.cat(found)

    whole = last(slice(0, 4))
    torch.testing.assert_close(last(slice(0, 1), slice(1, 4)), whole)
    assert not torch.allclose(network.eval()(images)[-1], whole)


def _detector(*overrides):
    from vitpipe.dense.detector import build_detector, detector_config
    from vitpipe.dense.mm_import import open_detection

    open_detection()
    head = "detect.head={name: mask_rcnn, neck: fpn, width: 16, fc_width: 16, norm: batch}"
    model = "model={name: swin_nano, image_size: 64, patch_size: null, pooling: null}"
    stages = "stages=[prepare, detect, report]"
    recipe = load_recipe("selfpatch/dino", "demo", [model, stages, head, *overrides])
    config = detector_config(recipe.detect, recipe.model, num_classes=3, norm="BN")
    return build_detector(config, recipe.detect), recipe


@pytest.mark.dense
def test_weights_survive_the_framework_s_initialisation(tmp_path):
    """mmengine's `init_weights` goes through all modules that have one."""
    detector, recipe = _detector()
    detector.init_weights()
    save_weights(_drawn(build_encoder(recipe.model)), tmp_path / "w.safetensors")
    transfer_weights(detector.backbone.net, tmp_path / "w.safetensors")
    loaded = {name: t.clone() for name, t in detector.backbone.state_dict().items()}
    detector.init_weights()
    assert all(torch.equal(t, loaded[name]) for name, t in detector.backbone.state_dict().items())


@pytest.mark.dense
def test_what_the_released_optimisers_exempt_does_not_decay():
    """Tables and whatever has "norm" in its name; biases decay, and so do the batch norms of a box head."""
    from vitpipe.dense.method import DenseMethod

    detector, recipe = _detector("detect.optim.decay_vectors=true", "detect.head.box_convs=1")
    groups = DenseMethod(detector).groups(recipe.detect.optim)
    exempt = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    names = {name for name, _ in detector.named_parameters()}
    assert exempt == {name for name in names if "norm" in name or name.endswith(TABLE)}
    assert {f"{NET_PREFIX}norms.3.bias", f"{NET_PREFIX}backbone.layers.1.downsample.norm.weight"} <= exempt
    batch_norms = {
        f"{name}.weight" for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    assert batch_norms
    assert not batch_norms & exempt
