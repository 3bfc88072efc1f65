"""SelfPatch's detectors and segmentors: parameters of the released configurations, their optimisers, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from selfpatch_golden import GOLDEN, keys

from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.dense.backbone import NET_PREFIX
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.method import DenseMethod
from vitpipe.dense.mm_import import open_detection, open_segmentation
from vitpipe.dense.segmentor import build_segmentor, segmentor_config

pytestmark = pytest.mark.dense

COUNTS = json.loads((GOLDEN / "selfpatch_params.json").read_text())
_MAIN = "selfpatch/dino_selfpatch"


def recipe(*overrides, name=_MAIN):
    return load_recipe(name, "full", ("data.root=.", *overrides))


def detector(chosen):
    open_detection()
    config = detector_config(chosen.detect, chosen.model, num_classes=80, norm="BN")
    with torch.device("meta"):
        return build_detector(config, chosen.detect)


def segmentor(chosen):
    open_segmentation()
    config = segmentor_config(chosen.segment, chosen.model, num_classes=150, norm="BN")
    with torch.device("meta"):
        return build_segmentor(config, chosen.segment)


def count(network):
    return sum(p.numel() for p in network.parameters())


def counts(network):
    """By part, as recorded."""
    parts = {name: count(part) for name, part in network.named_children() if count(part)}
    return {"total": sum(parts.values()), **parts}


def test_the_detector_has_the_published_parameters():
    network, known = detector(recipe()), COUNTS["Mask R-CNN + FPN, ViT-S/16 (official detection config)"]
    assert count(network) == known["total"] == 43_734_000
    assert count(network.backbone) == known["backbone with the four pyramid operations"]
    # Of the parts behind the trunk also the names and shapes.
    official = keys("selfpatch_vit_small_16_maskrcnn")["keys"]
    theirs = {name: shape for name, shape in official.items() if not name.startswith("backbone.")}
    ours = {
        name: list(t.shape) for name, t in network.state_dict().items() if not name.startswith("backbone.")
    }
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "known", "overrides"),
    [
        (_MAIN, "ViT-S/16 + Semantic FPN (official config, pos_embed at 512)", ()),
        (
            "selfpatch/upernet/dino_selfpatch",
            "ViT-S/16 + UPerNet, MultiLevelNeck (library's DeiT-S 'mln' config)",
            (),
        ),
        (
            "selfpatch/upernet/dino_selfpatch",
            "ViT-S/16 + UPerNet, no neck (library's DeiT-S config without neck)",
            ("segment.head.neck=none",),
        ),
        (
            "selfpatch/upernet/dino_selfpatch",
            "ViT-S/16 + UPerNet, four pyramid operations as in detection (computed)",
            ("segment.head.neck=none", "model.segment_maps=pyramid"),
        ),
    ],
)
def test_segmentors_have_the_recorded_parameters(name, known, overrides):
    found = counts(segmentor(recipe(*overrides, name=name)))
    for part, number in COUNTS[known].items():
        if part == "without auxiliary head":
            assert found["total"] - found["auxiliary_head"] == number
        else:
            assert found.get(part, 0) == number


def test_semantic_fpn_has_the_released_names_behind_the_trunk():
    official = keys("selfpatch_vit_small_16_semfpn")["keys"]
    theirs = {name: shape for name, shape in official.items() if not name.startswith("backbone.")}
    state = segmentor(recipe()).state_dict()
    assert {n: list(t.shape) for n, t in state.items() if not n.startswith("backbone.")} == theirs


def test_upernet_has_the_released_names_behind_the_trunk():
    official = keys("selfpatch_vit_small_16_upernet_mln")["keys"]
    theirs = {name: shape for name, shape in official.items() if not name.startswith("backbone.")}
    state = segmentor(recipe(name="selfpatch/upernet/dino_selfpatch")).state_dict()
    assert {n: list(t.shape) for n, t in state.items() if not n.startswith("backbone.")} == theirs


def decays(network, section):
    groups = DenseMethod(network).groups(section.optim)
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def test_vectors_decay_except_what_the_released_detector_exempts_by_name():
    chosen = recipe()
    found, net = decays(detector(chosen), chosen.detect), f"{NET_PREFIX}backbone"
    for name in ("position", "blocks.0.norm1.weight", "blocks.11.norm2.bias"):
        assert found[f"{net}.{name}"] == 0.0
    # Biases decay, and so does the batch norm of the pyramid, whose name has no "norm".
    for name in (f"{net}.blocks.0.attn.qkv.bias", f"{NET_PREFIX}rescale.0.1.weight", "rpn_head.rpn_cls.bias"):
        assert found[name] == 0.05


def test_in_the_segmentor_the_norms_of_blocks_decay():
    chosen = recipe()
    found, net = decays(segmentor(chosen), chosen.segment), f"{NET_PREFIX}backbone"
    assert found[f"{net}.position"] == 0.0
    for name in (f"{net}.blocks.0.norm1.weight", f"{net}.blocks.0.mlp.fc1.bias", "decode_head.conv_seg.bias"):
        assert found[name] == 0.01
    usual = decays(segmentor(chosen), recipe("segment.optim.decay_vectors=false").segment)
    assert {usual[f"{net}.blocks.0.norm1.weight"], usual["decode_head.conv_seg.bias"]} == {0.0}
    with_token = recipe("model.pooling=class_token")
    found = decays(segmentor(with_token), with_token.segment)
    assert {found[f"{net}.class_token"], found[f"{net}.class_position"]} == {0.0}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["detect.head.neck=none"], "detect.head.neck is none, .* set it to fpn"),
        (["model.patch_size=28", "stages=[prepare, detect, report]"], "needs multiples of 28"),
        (["segment.crop_size=500"], "needs a multiple of 16"),
        (
            [
                "model.patch_size=12",
                "model.image_size=240",
                "model.segment_maps=pyramid",
                "stages=[prepare, segment, report]",
            ],
            "no pyramid of strides 4 to 32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(overrides, said):
    with pytest.raises(RecipeError, match=said):
        recipe(*overrides)


def test_an_fpn_on_a_network_with_a_pyramid_is_refused():
    with pytest.raises(RecipeError, match="feature pyramid of its own"):
        recipe("detect.head.neck=fpn", name="itpn/pixel_base")


def test_the_released_detectors_eight_heads_are_an_option():
    chosen = recipe("model.heads=8", "stages=[prepare, detect, report]", "expect=[]")
    network = detector(chosen)
    assert network.backbone.net.backbone.blocks[0].attn.num_heads == 8
    assert count(network) == 43_734_000
