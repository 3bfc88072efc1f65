"""Mask2Former's configuration: released values, float32, inference on whole images and windows, several sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitpipe.dense.heads.mask2former.config import Mask2FormerConfig
from vitpipe.dense.heads.mask2former.head import HEAD as MASK2FORMER
from vitpipe.dense.method import DenseMethod
from vitpipe.dense.mm_import import open_segmentation
from vitpipe.dense.multi_scale import MergedSizes
from vitpipe.dense.segmentor import build_segmentor, multi_scale_pipeline, segmentor_config

pytestmark = pytest.mark.dense
RESNET50_WIDTHS = (256, 512, 1024, 2048)


@pytest.fixture
def segmentor(tiny_head):
    """The tiny network, in evaluation mode."""

    def make(*overrides):
        open_segmentation(("mmdet.models",))
        recipe = tiny_head("mask2former", *overrides)
        torch.manual_seed(0)
        config = segmentor_config(recipe.segment, recipe.model, num_classes=3, norm="BN")
        network = build_segmentor(config, recipe.segment)
        network.init_weights()
        return network.eval()

    return make


def released_head():
    parts = MASK2FORMER.parts(Mask2FormerConfig(), widths=RESNET50_WIDTHS, num_classes=150, norm="BN")
    return parts["decode_head"]


def test_released_values():
    head = released_head()
    assert (head["num_queries"], head["feat_channels"], head["out_channels"]) == (100, 256, 256)
    encoder, decoder = head["pixel_decoder"]["encoder"], head["transformer_decoder"]
    assert (encoder["num_layers"], decoder["num_layers"]) == (6, 9)
    assert encoder["layer_cfg"]["self_attn_cfg"]["num_heads"] == 8
    assert encoder["layer_cfg"]["self_attn_cfg"]["num_levels"] == 3
    assert encoder["layer_cfg"]["ffn_cfg"]["feedforward_channels"] == 1024
    assert decoder["layer_cfg"]["ffn_cfg"]["feedforward_channels"] == 2048
    weights = [head[name]["loss_weight"] for name in ("loss_cls", "loss_mask", "loss_dice")]
    assert weights == [cost["weight"] for cost in head["train_cfg"]["assigner"]["match_costs"]] == [2, 5, 5]
    assert head["loss_cls"]["class_weight"] == [1.0] * 150 + [0.1]
    rules = head["train_cfg"]
    assert [rules[name] for name in ("num_points", "oversample_ratio", "importance_sample_ratio")] == [
        12544,
        3.0,
        0.75,
    ]


def test_parameters_of_the_published_head():
    """The paper has 44 M with ResNet-50, of which 23.5 M are the backbone's."""
    from mmengine.config import ConfigDict

    open_segmentation(("mmdet.models",))
    from mmseg.registry import MODELS

    import vitpipe.dense.heads.mask2former.full_precision  # noqa: F401

    with torch.device("meta"):
        head = MODELS.build(ConfigDict(released_head()))
    count = sum(parameter.numel() for parameter in head.parameters())
    assert round(count / 1e6 + 23.5) == 44


def test_head_is_in_full_precision_under_autocast(segmentor):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    head = segmentor().decode_head
    widths = (32, 48, 80, 80)
    maps = tuple(
        torch.randn(1, width, 16 >> level, 16 >> level).bfloat16() for level, width in enumerate(widths)
    )
    labels = torch.arange(64).div(22, rounding_mode="floor").repeat(1, 64, 1)
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo={"img_shape": (64, 64)})

    def losses(levels):
        torch.manual_seed(1)
        return head.loss(levels, [sample], None)

    with torch.autocast("cpu", torch.bfloat16):
        found = losses(maps)
        scores = head.predict(maps, [{"img_shape": (64, 64)}], {})
    expected = losses(tuple(level.float() for level in maps))
    assert found == expected
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert (scores.shape, scores.dtype) == ((1, 3, 64, 64), torch.float32)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_predictions_have_the_original_size(segmentor, mode):
    from mmseg.structures import SegDataSample

    network = segmentor(f"segment.inference={mode}")
    assert network.test_cfg["mode"] == mode
    # Whole images are padded to a multiple of 32, those for a sliding window to its size.
    shape = (60, 50) if mode == "whole" else (40, 200)
    meta = {"img_shape": shape, "ori_shape": (30, 100), "pad_shape": shape, "flip": False}
    with torch.no_grad():
        batch = {
            "inputs": [torch.zeros(3, *shape, dtype=torch.uint8)],
            "data_samples": [SegDataSample(metainfo=meta)],
        }
        (found,) = network.test_step(batch)
    assert found.pred_sem_seg.data.shape == (1, 30, 100)


def test_optimiser(segmentor, tiny_head):
    section = tiny_head("mask2former").segment
    network = segmentor()
    decay = {
        name: g["weight_decay"] for g in DenseMethod(network).groups(section.optim) for name in g["names"]
    }
    undecayed = {name for name, value in decay.items() if value == 0 and "backbone" not in name}
    embeddings = {f"decode_head.{name}.weight" for name in ("query_embed", "query_feat", "level_embed")}
    assert embeddings <= undecayed
    assert decay["decode_head.cls_embed.weight"] == 0.05


@pytest.mark.parametrize("synchronised", [False, True])
def test_batch_norms_between_backbone_and_head_are_synchronised_too(segmentor, synchronised):
    network = segmentor()
    network.backbone.neck = nn.BatchNorm2d(4)
    weight = network.backbone.neck.weight
    method = DenseMethod(network, synchronised=synchronised)
    assert type(method.model.backbone.neck) is (nn.SyncBatchNorm if synchronised else nn.BatchNorm2d)
    assert method.model.backbone.neck.weight is weight


def test_sizes_and_mirror_images(full_recipe):
    section = full_recipe.segment.model_copy(update={"multi_scale_ratios": (0.5, 1.75)})
    sizes, flips, *_ = multi_scale_pipeline(section)[1]["transforms"]
    assert [size["scale"] for size in sizes] == [(1024, 256), (3584, 896)]
    assert [flip["prob"] for flip in flips] == [0.0, 1.0]


@pytest.mark.parametrize(("softmax", "expected"), [(True, 1), (False, 0)])
def test_scores_of_all_versions_count_alike(softmax, expected):
    """Logits are made probabilities first: one sure version does not outvote two others by its size."""
    versions = [torch.tensor([9.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.0, 3.0])]

    class Fake(nn.Module):
        def test_step(self, batch):
            (scores,) = batch["inputs"]
            data = SimpleNamespace(data=scores.reshape(2, 1, 1))
            return [SimpleNamespace(seg_logits=data, pred_sem_seg=SimpleNamespace(data=None))]

    batch = {"inputs": [[scores] for scores in versions], "data_samples": [[None]] * 3}
    (found,) = MergedSizes(Fake(), softmax=softmax).test_step(batch)
    assert found.pred_sem_seg.data.tolist() == [[[expected]]]
