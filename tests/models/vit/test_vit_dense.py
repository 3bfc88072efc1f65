"""Plain vision transformers as dense features: numbers of the released networks, strides, tables, rules."""

from __future__ import annotations

import pytest
import torch
from selfpatch_golden import ENTRIES, TOLERANCE, error, filled, probe

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError
from vitpipe.models.build import build_dense, build_encoder
from vitpipe.models.positions import resample_positions
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import save_weights

_IN_BLOCKS = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}


def model(name="vit_tiny", **options):
    return model_config({"name": name, "pooling": "class_attention", **options})


def in_detection(name):
    """Our name -> that in the released detector's backbone."""
    if name == "backbone.position":
        return "pos_embed"
    if name.startswith("backbone.patch_embed."):
        return name.replace("backbone.patch_embed.", "patch_embed.proj.")
    # The released fpn1 is the pyramid's finest map, fpn2 the next; a module alone is a sequence of one.
    if name.startswith("rescale.0."):
        return name.replace("rescale.0.", "fpn1.")
    return name.replace("backbone.", "").replace("rescale.1.", "fpn2.0.")


def in_segmentation(name):
    """Our name -> that in the released segmentor's backbone."""
    if name == "backbone.position":
        return "pos_embed"
    name = name.replace("backbone.patch_embed.", "patch_embed.projection.").replace(
        "backbone.blocks", "layers"
    )
    for ours, theirs in _IN_BLOCKS.items():
        name = name.replace(ours, theirs)
    return name.replace("attn.qkv.", "attn.attn.in_proj_").replace("attn.proj.", "attn.attn.out_proj.")


def fill(network, official_name):
    shapes = {official_name(name): list(t.shape) for name, t in network.state_dict().items()}
    values = filled(shapes)
    floats = {n: values[official_name(n)] for n, t in network.state_dict().items() if t.is_floating_point()}
    network.load_state_dict(floats, strict=False)
    return network.eval()


@torch.no_grad()
def test_the_pyramid_is_the_released_detectors():
    entry = ENTRIES["detection_pyramid_dim192"]
    network = fill(build_dense(model(), "detect", image_size=224), in_detection)
    assert sum(p.numel() for p in network.parameters()) == entry["params"]
    assert network.blocks == tuple(entry["model"]["out_indices"])
    maps = network(probe(entry["input"]))
    for level, (found, stride) in enumerate(zip(maps, (4, 8, 16, 32), strict=True)):
        assert error(found, entry["record"][f"level_{level}_stride_{stride}"]) < TOLERANCE


@torch.no_grad()
def test_single_maps_are_the_released_segmentors():
    entry = ENTRIES["segmentation_features_dim192"]
    network = fill(build_dense(model(), "segment", image_size=512), in_segmentation)
    network.backbone.position.copy_(0.2 * probe("probe([1, 1024, 192], seed=911)"))
    assert sum(p.numel() for p in network.parameters()) == entry["params"]
    assert network.blocks == tuple(entry["model"]["out_indices"])
    for level, found in enumerate(network(probe(entry["input"]))):
        assert error(found, entry["record"][f"level_{level}"]) < TOLERANCE


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
@pytest.mark.parametrize("pooling", ["class_token", "class_attention", "mean"])
@torch.no_grad()
def test_a_pyramid_has_its_strides_for_every_patch(patch, pooling):
    chosen = model("vit_nano", image_size=64, patch_size=patch, pooling=pooling, segment_maps="pyramid")
    for task in ("detect", "segment"):
        maps = build_dense(chosen, task, image_size=64)(torch.randn(1, 3, 64, 96))
        assert [m.shape[1:] for m in maps] == [(64, 64 // s, 96 // s) for s in (4, 8, 16, 32)]


def test_a_pyramid_of_odd_patches_is_refused():
    chosen = model("vit_nano", image_size=48, patch_size=12)
    with pytest.raises(InputError, match="patches of 12"):
        build_dense(chosen, "detect", image_size=48)


def load(tmp_path, network, **options):
    """Account and network after loading a pre-trained encoder."""
    given = build_encoder(model("vit_nano", image_size=64, patch_size=8, **options))
    save_weights(given, tmp_path / "weights.safetensors")
    rows = transfer_weights(network, tmp_path / "weights.safetensors").table()
    return given, {row["target"] or row["source"]: row for row in rows}


@torch.no_grad()
def test_tables_are_resized_with_the_offset_in_detection_and_without_in_segmentation(tmp_path):
    chosen = model("vit_nano", image_size=64, patch_size=8)
    segmentor = build_dense(chosen, "segment", image_size=96)
    given, _ = load(tmp_path, segmentor)
    table, images = given.backbone.position, torch.randn(1, 3, 80, 128)
    without = resample_positions(table, (12, 12), has_offset=False)
    assert torch.equal(segmentor.backbone.position, without)
    resized = resample_positions(without, (10, 16), has_offset=False)
    assert torch.equal(segmentor.backbone.positions_for((10, 16)), resized)
    detector = build_dense(chosen, "detect", image_size=64)
    load(tmp_path, detector)
    assert torch.equal(
        detector.backbone.positions_for((10, 16)), resample_positions(detector.backbone.position, (10, 16))
    )
    assert all(torch.isfinite(m).all() for m in (*segmentor(images), *detector.eval()(images)))


@pytest.mark.parametrize("pooling", ["class_token", "class_attention", "mean"])
def test_what_dense_features_do_not_use_is_named(tmp_path, pooling):
    chosen = model("vit_nano", image_size=64, patch_size=8, pooling=pooling)
    _, account = load(tmp_path, build_dense(chosen, "detect", image_size=64), pooling=pooling)
    unused = {
        key.split(".")[0] + "." + key.split(".")[1]
        for key, row in account.items()
        if row["outcome"] == "unused"
    }
    expected = {"class_token": {"backbone.norm"}, "mean": {"backbone.norm"}}
    if pooling == "class_attention":
        assert unused
        assert all(key.startswith("aggregation.") for key in unused)
    else:
        assert unused == expected[pooling]
    new = {key for key, row in account.items() if row["outcome"] == "missing"}
    assert new
    assert all(key.startswith("rescale.") for key in new)


def test_layers_are_numbered_from_the_patches_to_the_maps():
    network = build_dense(model("vit_nano", patch_size=8, image_size=64), "detect", image_size=64)
    layers = {name: network.layer_of(name) for name, _ in network.named_parameters()}
    assert {layers["backbone.position"], layers["backbone.patch_embed.weight"]} == {0}
    assert layers["backbone.blocks.3.mlp.fc1.weight"] == 4
    assert layers["rescale.0.weight"] == network.head_layer == 5
    assert set(layers.values()) == set(range(network.num_layers))
