"""drloc's detectors and segmentor on Swin-T: published sizes, mmdetection's own values, training and tests."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.read import load_recipe
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.dense.coco_dataset import eval_pipeline, train_pipeline
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.mm_import import open_detection, open_segmentation
from vitpipe.dense.segmentor import build_segmentor, multi_scale_pipeline, segmentor_config
from vitpipe.optim.schedules import learning_rate

pytestmark = pytest.mark.dense

_COCO, _ADE20K = "drloc/coco/swin_t/imagenet", "drloc/ade20k/swin_t/imagenet"
# mmdetection's counter and Swin's tables: so many regions for the box heads, and for the mask heads.
_REGIONS, _MASKED = 1000, 100


def recipe(name, *overrides):
    return load_recipe(name, "full", ("data.root=.", *overrides))


def detector_values(chosen):
    open_detection()
    return detector_config(chosen.detect, chosen.model, num_classes=80, norm="BN")


class OneImage(nn.Module):
    """A forward pass of all parts of a detector or segmentor but the auxiliary head, without the choice of boxes."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()  # pooling to one value has no batch statistics of one image

    def forward(self, images_BCHW):
        network = self.network
        maps = network.backbone(images_BCHW)
        if hasattr(network, "decode_head"):
            network.decode_head(maps)
            return
        maps = network.neck(maps)
        network.rpn_head(maps)
        width, parts = maps[0].shape[1], network.roi_head
        for heads, regions, side in ((parts.bbox_head, _REGIONS, 7), (parts.mask_head, _MASKED, 14)):
            for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                head(torch.empty(regions, width, side, side, device=images_BCHW.device))


@pytest.mark.parametrize(
    ("name", "size", "millions", "giga"),
    [
        (f"{_COCO}/mask_rcnn", (800, 1280), 48, 267),
        (f"{_COCO}/cascade", (800, 1280), 86, 745),
        (_ADE20K, (512, 2048), 60, 945),
    ],
)
def test_parameters_and_multiply_adds_as_swins_authors_state_them(name, size, millions, giga):
    """Within 0.2 %, attention products included, of numbers that are rounded to 1 M and 1 G."""
    chosen = recipe(name)
    if chosen.detect:
        values = detector_values(chosen)
        build = lambda: OneImage(build_detector(values, chosen.detect))  # noqa: E731
    else:
        open_segmentation()
        values = segmentor_config(chosen.segment, chosen.model, num_classes=150, norm="BN")
        build = lambda: OneImage(build_segmentor(values, chosen.segment))  # noqa: E731
    cost = measure_cost(build, size)
    assert cost.params / 1e6 == pytest.approx(millions, abs=0.5)
    assert cost.gmacs == pytest.approx(giga, rel=2e-3)


def test_the_parts_have_the_parameters_of_mmdetections_swin():
    with torch.device("meta"):
        chosen = recipe(f"{_COCO}/cascade")
        network = build_detector(detector_values(chosen), chosen.detect)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert counts["backbone"] == 27_520_698
    assert len(network.roi_head.mask_head) == len(network.roi_head.bbox_head) == 3


def released(name):
    """The model of a configuration that mmdetection ships."""
    import mmdet

    file = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / name
    return runpy.run_path(str(file))["model"]


@pytest.mark.parametrize(
    ("head", "file"),
    [("mask_rcnn", "mask-rcnn_r50_fpn.py"), ("cascade", "cascade-mask-rcnn_r50_fpn.py")],
)
def test_what_swin_does_not_change_is_mmdetections(head, file):
    ours, theirs = detector_values(recipe(f"{_COCO}/{head}")), released(file)
    for name in ("train_cfg", "test_cfg"):
        assert ours[name] == theirs[name]
    rpn = {name: ours["rpn_head"][name] for name in theirs["rpn_head"]}
    assert rpn == theirs["rpn_head"]
    assert ours["neck"] == {**theirs["neck"], "in_channels": [96, 192, 384, 768]}
    for name, value in theirs["roi_head"].items():
        if name == "mask_head":
            assert {key: ours["roi_head"][name][key] for key in value} == value
        elif name != "bbox_head":
            assert ours["roi_head"][name] == value, name


def test_the_box_heads_are_mmdetections_standard_one_and_swins():
    (box,) = [detector_values(recipe(f"{_COCO}/mask_rcnn"))["roi_head"]["bbox_head"]]
    assert (box["num_shared_convs"], box["num_shared_fcs"], box["fc_out_channels"]) == (0, 2, 1024)
    assert (box["reg_decoded_bbox"], box["loss_bbox"]["type"]) == (False, "L1Loss")
    heads = detector_values(recipe(f"{_COCO}/cascade"))["roi_head"]["bbox_head"]
    for number, head in enumerate(heads, 1):
        assert (head["num_shared_convs"], head["num_shared_fcs"], head["conv_out_channels"]) == (4, 1, 256)
        assert (head["fc_out_channels"], head["norm_cfg"]["type"]) == (1024, "BN")
        assert (head["reg_class_agnostic"], head["reg_decoded_bbox"]) == (False, True)
        assert head["loss_bbox"] == {"type": "GIoULoss", "loss_weight": 10.0}
        stds = [std / number for std in (0.1, 0.1, 0.2, 0.2)]
        assert head["bbox_coder"]["target_stds"] == pytest.approx(stds)
    assert recipe(f"{_COCO}/cascade").detect.drop_path == 0.0
    assert recipe(f"{_COCO}/mask_rcnn").detect.drop_path == 0.1


def test_the_batch_norm_of_the_box_heads_is_synchronised():
    chosen = recipe(f"{_COCO}/cascade")
    values = detector_config(chosen.detect, chosen.model, num_classes=80, norm="SyncBN")
    types = {head["norm_cfg"]["type"] for head in values["roi_head"]["bbox_head"]}
    assert types == {"SyncBN"}


def test_images_in_detection():
    section = recipe(f"{_COCO}/mask_rcnn").detect
    steps = train_pipeline(section)
    assert {"type": "RandomFlip", "prob": 0.5} in steps
    (plain,), (first, crop, second) = next(step for step in steps if step["type"] == "RandomChoice")[
        "transforms"
    ]
    scales = [(short, 1333) for short in range(480, 801, 32)]
    assert plain["scales"] == second["scales"] == scales
    assert first["scales"] == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop["crop_type"], crop["crop_size"]) == ("absolute_range", (384, 600))
    assert crop["allow_negative_crop"]
    assert eval_pipeline(section)[1]["scale"] == (1333, 800)
    assert detector_values(recipe(f"{_COCO}/mask_rcnn"))["data_preprocessor"]["pad_size_divisor"] == 32


@pytest.mark.parametrize(("flips", "expected"), [(False, [0.0]), (True, [0.0, 1.0])])
def test_six_sizes_of_a_picture(flips, expected):
    section = recipe(_ADE20K, f"segment.multi_scale_flips={str(flips).lower()}").segment
    sizes, mirrored, *_ = multi_scale_pipeline(section)[1]["transforms"]
    assert [size["scale"][1] for size in sizes] == [256, 384, 512, 640, 768, 896]
    assert [flip["prob"] for flip in mirrored] == expected


def rates(section, path, num_images):
    """Step -> learning rate, and the number of steps of an epoch and of the whole run."""
    plan = train_plan(
        section, path=path, num_images=num_images, num_ranks=8, accelerator=Accelerator("cuda", has_bf16=True)
    )
    return lambda step: learning_rate(step, plan, section.optim), plan.steps_per_epoch, plan.num_steps


def test_the_learning_rate_in_detection():
    rate, epoch, num_steps = rates(recipe(f"{_COCO}/cascade").detect, "detect", 117_266)
    assert num_steps == 12 * epoch
    assert [rate(step) for step in (0, 250, 500, 8 * epoch - 1)] == pytest.approx(
        [1e-7, 5.005e-5, 1e-4, 1e-4]
    )
    assert [rate(step) for step in (8 * epoch, 11 * epoch)] == pytest.approx([1e-5, 1e-6])


def test_the_learning_rate_in_segmentation():
    rate, _, num_steps = rates(recipe(_ADE20K).segment, "segment", 20_210)
    assert num_steps == 160_000
    assert rate(0) == pytest.approx(6e-5 * 1e-6)
    assert rate(1_500) == pytest.approx(6e-5 * (1 - 1_500 / 160_000))
    assert rate(80_000) == pytest.approx(3e-5)
    assert rate(160_000) == 0.0


@pytest.mark.parametrize("pretraining", ["imagenet", "imagenet100"])
def test_the_learning_rate_in_pre_training(pretraining):
    section = recipe(f"drloc/ade20k/swin_t/{pretraining}").finetune
    assert section.dataset == pretraining
    rate, epoch, num_steps = rates(section, "finetune", 126_689)
    assert num_steps == 300 * epoch
    assert [rate(0), rate(10 * epoch), rate(num_steps)] == pytest.approx([1e-6, 5.005e-4, 1e-5])
    # The warm-up replaces the beginning of the cosine.
    after = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 20 / 300))
    assert rate(20 * epoch) == pytest.approx(after)


@pytest.mark.parametrize("name", [f"{_COCO}/mask_rcnn", _ADE20K])
def test_both_kinds_of_recipe_train_the_same_network_before(name):
    """So that a table's runs share it."""
    assert recipe(name).finetune == recipe(f"{_COCO}/cascade").finetune


@pytest.mark.parametrize("name", [f"{_COCO}/mask_rcnn", f"{_COCO}/cascade", _ADE20K])
def test_the_loss_is_part_of_pre_training_only(name):
    plain, learned = recipe(name), recipe(name.replace("swin_t", "swin_t_drloc"))
    assert (plain.finetune.method.name, learned.finetune.method.name) == ("classify", "drloc")
    assert learned.finetune.method.weight == 0.5
    assert learned.finetune.model_copy(update={"method": plain.finetune.method}) == plain.finetune
    assert (learned.detect, learned.segment) == (plain.detect, plain.segment)


def test_a_cascade_with_a_mask_head_per_stage_leaves_gradients_as_they_are():
    chosen = load_recipe(f"{_COCO}/cascade", "demo")
    open_detection()
    torch.manual_seed(0)
    values = detector_config(chosen.detect, chosen.model, num_classes=10, norm="BN")
    head = build_detector(values, chosen.detect).roi_head
    maps = tuple(torch.randn(1, 64, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32, 64))
    rois = torch.tensor([[0.0, 4.0, 4.0, 40.0, 40.0], [0.0, 8.0, 8.0, 32.0, 60.0]])
    gradients = []
    for ours in (True, False):
        finest = maps[0].clone().requires_grad_()
        levels = (finest, *maps[1:])
        if ours:
            found = head._bbox_forward(1, levels, rois)
            scores, boxes = found["cls_score"], found["bbox_pred"]
        else:
            scores, boxes = head.bbox_head[1](head.bbox_roi_extractor[1](levels[:4], rois))
        assert boxes.shape == (2, 4 * 10)  # one box per class
        scores.square().sum().backward()
        gradients.append(finest.grad)
    assert gradients[1].abs().sum() > 0
    torch.testing.assert_close(*gradients)
