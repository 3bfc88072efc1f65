"""Vision transformers agree with numbers of the released networks of SelfPatch and DINO."""

from __future__ import annotations

import pytest
import torch
from selfpatch_golden import ENTRIES, TOLERANCE, error, filled, keys, probe

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.models.build import build_encoder
from vitpipe.models.convert import convert_state
from vitpipe.models.positions import class_sincos_table
from vitpipe.models.vit.vit import SHAPES, ViT
from vitpipe.models.weights import load_into


def encoder(checkpoint: str, **options):
    """The network of an official key list, filled by its official names, and converted."""
    official = filled(keys(checkpoint)["backbone_only"])
    converted = convert_state(official)
    network = build_encoder(model_config({"name": converted.model, **options})).eval()
    if network.aggregation is not None:
        network.aggregation = None  # a bare trunk has no weights for it
    load_into(network, converted.state)
    return network


@pytest.mark.parametrize(
    "name", ["selfpatch_vit_tiny_224x224", "selfpatch_vit_tiny_96x96", "selfpatch_vit_tiny_96x160"]
)
@torch.no_grad()
def test_trunks_without_class_token(name):
    network = encoder("selfpatch_vit_tiny_16_coco", pooling="class_attention")
    found = network.backbone(probe(ENTRIES[name]["input"]), range(-4, 0))
    for block, patches in zip(range(9, 13), found.patches, strict=True):
        assert error(patches, ENTRIES[name]["record"][f"block_{block}_output"]) < TOLERANCE
    assert sum(p.numel() for p in network.backbone.parameters()) == ENTRIES[name]["params"]


@pytest.mark.parametrize("name", ["dino_vit_tiny_224x224", "dino_vit_tiny_96x96"])
@torch.no_grad()
def test_trunks_with_class_token(name):
    network, images = encoder("dino_vit_tiny_16"), probe(ENTRIES[name]["input"])
    record, found = ENTRIES[name]["record"], network.features(images)
    assert error(found.pooled, record["cls"]) < TOLERANCE
    assert error(network.final_norm(found.tokens[0]), record["patch_tokens"]) < TOLERANCE
    assert error(network.frozen_features(images, 4), record["linear_eval_feature_n4"]) < TOLERANCE
    assert torch.equal(network.frozen_features(images), found.pooled)
    assert sum(p.numel() for p in network.parameters()) == ENTRIES[name]["params"]


@pytest.mark.parametrize(
    ("name", "class_token"), [("selfpatch_vit_tiny_224x224", False), ("dino_vit_tiny_224x224", True)]
)
def test_multiply_adds_are_the_recorded_ones(name, class_token):
    cost = measure_cost(
        lambda: ViT(SHAPES["vit_tiny"], image_size=224, class_token=class_token, last_norm=class_token), 224
    )
    assert cost.macs == ENTRIES[name]["flops"]["macs"]


@torch.no_grad()
def test_position_tables_are_resized_as_released():
    entry = ENTRIES["pos_embed_interpolation"]
    network = ViT(SHAPES["vit_nano"], image_size=224, class_token=False)
    network.position = torch.nn.Parameter(probe(entry["input"]["pos_embed"]))
    for size, recorded in entry["record"].items():
        height, width = (int(side) for side in size.split("x"))
        assert error(network.positions_for((height // 16, width // 16)), recorded) < TOLERANCE
    # EsViT's has no offset: another table for the same crop.
    network.has_offset = False
    assert error(network.positions_for((6, 6)), entry["record"]["96x96"]) > 0.01


def test_moco_v3_stores_the_fixed_table():
    """Channel 0 of the patch in row r is sin(r), channel D/2 that of its column; the class entry is zero."""
    table = class_sincos_table(14, 384)[0].view(14, 14, 384)
    rows = torch.arange(14.0)
    torch.testing.assert_close(table[:, 3, 0], rows.sin())
    torch.testing.assert_close(table[3, :, 192], rows.sin())
    torch.testing.assert_close(table[:, 3, 96], rows.cos())
    network = build_encoder(model_config({"name": "vit_small", "heads": 12, "position": "sincos"}))
    published = keys("mocov3_vit_small")["parameters"]["encoder without projector"]
    assert sum(p.numel() for p in network.parameters()) + 197 * 384 == published
