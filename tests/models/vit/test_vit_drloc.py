"""drloc's ViT-B/16: timm's function with the stated changes, its initial values, dropout and decay."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drloc_golden import official, probe

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.build import build_classifier, build_dense, build_encoder
from vitpipe.models.convert import convert_state
from vitpipe.models.transfer import describe
from vitpipe.models.weights import load_into
from vitpipe.optim.groups import parameter_groups

BASE = model_config({"name": "vit_base_drloc"})
NAMES = {
    "0.norm": "norm1",
    "0.fn.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
}


def _of_timm(state):
    """timm's network with the changes of the specification, and the weights under its names."""
    from timm.models.vision_transformer import VisionTransformer

    renamed = {
        "pos_embed": state["pos_embedding"],
        "cls_token": state["cls_token"],
        "patch_embed.proj.bias": state["to_patch_embedding.1.bias"],
    }
    linear, kernel = state["to_patch_embedding.1.weight"], torch.empty(768, 3, 16, 16)
    for row in range(16):
        for column in range(16):
            for channel in range(3):
                kernel[:, channel, row, column] = linear[:, (row * 16 + column) * 3 + channel]
    renamed["patch_embed.proj.weight"] = kernel
    for theirs, timms in (("mlp_head.0", "norm"), ("mlp_head.1", "head")):
        renamed |= {f"{timms}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
    for block in range(12):
        for theirs, timms in NAMES.items():
            for part in ("weight", "bias"):
                name = f"transformer.layers.{block}.{theirs}.{part}"
                if name in state:
                    renamed[f"blocks.{block}.{timms}.{part}"] = state[name]
    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    network = VisionTransformer(qkv_bias=False, norm_layer=norm, proj_drop_rate=0.1)
    network.load_state_dict(renamed)
    return network.eval()


@torch.no_grad()
def test_is_timms_function_with_the_stated_changes():
    state = official("vit_base_16")
    network = build_classifier(BASE, num_classes=1000).eval()
    load_into(network, convert_state(state).state)
    timms, images = _of_timm(state), probe(1, 3, 224, 224)
    found = network.features(images)
    expected = timms.forward_intermediates(images, indices=[11], norm=False, intermediates_only=True)[0]
    for ours, theirs in ((network.logits(found), timms(images)), (found.maps()[-1], expected)):
        assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5
    # The patches are before the last norm, as drloc reads them.
    assert not torch.allclose(network.final_norm(found.tokens[-1]), found.tokens[-1], atol=0.1)


def test_parameters_and_cost_as_measured_of_the_released_code():
    cost = measure_cost(lambda: build_classifier(BASE, num_classes=100), 224)
    assert cost.params + 900 * 769 == 86_540_008
    assert round(cost.gmacs, 2) == 17.56


def test_initial_values_are_torchs_own_and_tables_standard_normal():
    torch.manual_seed(0)
    network = build_classifier(BASE, num_classes=1000)
    backbone = network.backbone
    for token in (backbone.class_token, backbone.class_position, backbone.position):
        assert token.std().item() == pytest.approx(1.0, abs=0.06)
    for layer in (backbone.blocks[4].attn.qkv, backbone.blocks[4].mlp.fc2, network.head):
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert backbone.blocks[0].mlp.fc1.bias.std() > 0
    assert backbone.norm.eps == backbone.blocks[0].norm1.eps == 1e-5
    # A recipe that fine-tunes may give the head its own; other networks keep theirs.
    assert BASE.head_init_std is None
    assert model_config({"name": "vit_base_drloc", "head_init_std": 0.01}).head_init_std == 0.01
    assert model_config({"name": "vit_small"}).head_init_std == 0.02


def test_everything_but_vectors_decays():
    with torch.device("meta"):
        networks = [build_classifier(BASE, num_classes=3), build_dense(BASE, "segment", image_size=512)]
    for network in networks:
        groups = parameter_groups(network.named_parameters(), weight_decay=0.05, no_decay=network.no_decay)
        kept = {n for group in groups if not group["decays"] for n in group["names"]}
        assert kept == {n for n, parameter in network.named_parameters() if parameter.ndim == 1}
    small = build_encoder(model_config({"name": "vit_nano", "image_size": 64}))
    assert small.no_decay == ("position", "class_token")


def test_dropout_is_behind_the_projection_and_both_layers_of_the_mlp():
    block = build_encoder(BASE).backbone.blocks[0]
    assert (block.attn.dropout, block.mlp.dropout) == (0.1, 0.1)
    torch.manual_seed(0)
    x = torch.randn(2, 197, 768)
    block.train()
    assert (block.attn(x) == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (block.mlp(x) == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    hidden = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    block.mlp(x)
    handle.remove()
    assert (hidden[0] == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    block.eval()
    assert (block.attn(x) == 0).sum() == 0


def test_its_weights_are_recognised_and_others_of_its_size_are_not():
    with torch.device("meta"):
        state = build_classifier(BASE, num_classes=5).state_dict()
    assert str(describe(state)) == "a classifier network of vit_base_drloc for 224 pixels"
    biased = {f"backbone.blocks.{n}.attn.qkv.bias": torch.empty(2304, device="meta") for n in range(12)}
    assert describe({**state, **biased}).model == "vit_base"
    known = official("vit_base_16")
    with pytest.raises(CheckpointError, match=r"to_patch_embedding\.1\.weight is not known"):
        convert_state({**known, "to_patch_embedding.1.weight": torch.zeros(768, 100)})
    with pytest.raises(CheckpointError, match="pos_embedding or to_patch_embedding"):
        convert_state({name: t for name, t in known.items() if name != "pos_embedding"})
    with pytest.raises(CheckpointError, match=r"transformer\.layers\.0\.2\.norm\.weight is not known"):
        convert_state({**known, "transformer.layers.0.2.norm.weight": torch.zeros(768)})
