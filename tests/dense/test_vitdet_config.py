"""Mask R-CNN and its cascade as ViTDet trains them: the published values, the jitter, the parts of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.datasets.dense_folder import open_dense
from vitpipe.dense.coco_dataset import coco_dataset, eval_pipeline, padding_groups, train_pipeline
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.layer_norm import LayerNorm2d
from vitpipe.dense.mm_import import open_detection

pytestmark = pytest.mark.dense


@pytest.fixture(scope="module")
def configs(vitdet_recipe):
    recipe = vitdet_recipe
    values = recipe.detect.model_dump()
    sections = {
        name: DetectConfig.model_validate({**values, "head": {**values["head"], "name": name}})
        for name in ("mask_rcnn", "cascade_mask_rcnn")
    }
    return {
        head: detector_config(section, recipe.model, num_classes=80, norm="SyncBN")
        for head, section in sections.items()
    }


@pytest.fixture
def tiny_detector(tiny_head):
    def make(head):
        open_detection()
        recipe = tiny_head(head)
        torch.manual_seed(0)
        config = detector_config(recipe.detect, recipe.model, num_classes=10, norm="BN")
        return build_detector(config, recipe.detect)

    return make


def test_both_heads(configs):
    for config in configs.values():
        assert config["data_preprocessor"]["pad_size_divisor"] == 1024
        assert config["rpn_head"]["num_convs"] == 2
        assert config["rpn_head"]["loss_bbox"] == {"type": "L1Loss", "loss_weight": 1.0}
        assert config["roi_head"]["mask_head"]["norm_cfg"] == {"type": "LN2d", "eps": 1e-6}
        assert config["roi_head"]["mask_head"]["num_convs"] == 4
        assert config["test_cfg"]["rcnn"]["nms"] == {"type": "nms", "iou_threshold": 0.5}


def test_single_box_head(configs):
    head = configs["mask_rcnn"]["roi_head"]["bbox_head"]
    assert head["norm_cfg"]["type"] == "LN2d"
    assert head["loss_bbox"] == {"type": "L1Loss", "loss_weight": 1.0}
    assert (head["reg_decoded_bbox"], head["reg_class_agnostic"]) == (False, False)
    assert head["bbox_coder"]["target_stds"] == [0.1, 0.1, 0.2, 0.2]


def test_cascade_stages(configs):
    config = configs["cascade_mask_rcnn"]
    heads, rules = config["roi_head"]["bbox_head"], config["train_cfg"]["rcnn"]
    weights = [[1 / std for std in head["bbox_coder"]["target_stds"]] for head in heads]
    assert weights == [
        pytest.approx(expected) for expected in ([10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15])
    ]
    assert [rule["assigner"]["pos_iou_thr"] for rule in rules] == [0.5, 0.6, 0.7]
    assert [rule["assigner"]["neg_iou_thr"] for rule in rules] == [0.5, 0.6, 0.7]
    assert not any(rule["assigner"]["match_low_quality"] for rule in rules)
    assert all(head["reg_class_agnostic"] for head in heads)
    assert config["roi_head"]["stage_loss_weights"] == [1.0, 1.0, 1.0]


def test_parameters_of_the_cascade(configs, tiny_head):
    """ViTDet-B has 111 M with Mask R-CNN and 141 M with the cascade: two box heads more, no mask head more."""
    open_detection()
    with torch.device("meta"):
        single, cascade = (
            sum(
                parameter.numel() for parameter in build_detector(config, tiny_head(name).detect).parameters()
            )
            for name, config in configs.items()
        )
    assert round((cascade - single) / 1e6) == 30


def test_pipelines(vitdet_recipe):
    steps = {step["type"]: step for step in train_pipeline(vitdet_recipe.detect)}
    resize, crop = steps["RandomResize"], steps["RandomCrop"]
    assert (resize["scale"], resize["ratio_range"], resize["keep_ratio"]) == ((1024, 1024), (0.1, 2.0), True)
    assert (crop["crop_type"], crop["crop_size"]) == ("absolute", (1024, 1024))
    assert steps["RandomFlip"]["prob"] == 0.5
    assert eval_pipeline(vitdet_recipe.detect)[1]["scale"] == (1024, 1024)


def test_large_scale_jitter(prepared, tiny_head, tiny_detector, tmp_path):
    """No side is beyond the square, boxes are those of what is left of the masks; all are padded to the square."""
    section = tiny_head("mask_rcnn").detect
    open_detection()
    folder = open_dense(prepared, "coco", tmp_path)
    dataset = coco_dataset(folder, "train", train_pipeline(section))
    assert set(padding_groups(section, dataset)) == {0}
    np.random.seed(0)
    samples = [dataset[index % len(dataset)] for index in range(24)]
    sides = set()
    for sample in samples:
        height, width = sample["inputs"].shape[-2:]
        sides.add(max(height, width))
        truth = sample["data_samples"].gt_instances
        assert len(truth.labels) == len(truth.bboxes) == len(truth.masks)
        assert truth.masks.masks.shape[1:] == (height, width)
        for box, mask in zip(truth.bboxes.tensor.tolist(), truth.masks.masks, strict=True):
            rows, columns = mask.nonzero()
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # Images are smaller than the square at times, and never larger.
    assert max(sides) == 64
    assert min(sides) < 40
    preprocess = tiny_detector("mask_rcnn").data_preprocessor
    for training in (True, False):
        batch = {key: [sample[key] for sample in samples[:2]] for key in ("inputs", "data_samples")}
        assert preprocess(batch, training)["inputs"].shape == (2, 3, 64, 64)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5))
def test_layer_norm_is_over_channels(num_images, channels, height, width):
    norm = LayerNorm2d(channels)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x_BCHW = torch.randn(num_images, channels, height, width)
    expected = F.layer_norm(x_BCHW.movedim(1, -1), (channels,), norm.weight, norm.bias, eps=1e-6)
    torch.testing.assert_close(norm(x_BCHW), expected.movedim(-1, 1))


def test_mmcv_builds_our_norm(tiny_detector):
    detector = tiny_detector("mask_rcnn")
    for head in (detector.roi_head.bbox_head.shared_convs, detector.roi_head.mask_head.convs):
        assert all(isinstance(conv.norm, LayerNorm2d) for conv in head)
        assert {conv.norm.eps for conv in head} == {1e-6}
        assert all(conv.conv.bias is None for conv in head)
    assert len(detector.rpn_head.rpn_conv) == 2


def test_cascade_averages_the_gradients_of_its_stages(tiny_detector):
    head = tiny_detector("cascade_mask_rcnn").roi_head
    maps = tuple(torch.randn(1, 16, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32, 64))
    rois = torch.tensor([[0.0, 4.0, 4.0, 40.0, 40.0]])
    gradients = []
    for ours in (True, False):
        finest = maps[0].clone().requires_grad_()
        levels = (finest, *maps[1:])
        if ours:
            scores = head._bbox_forward(1, levels, rois)["cls_score"]
        else:
            scores, _ = head.bbox_head[1](head.bbox_roi_extractor[1](levels[:4], rois))
        scores.square().sum().backward()
        gradients.append(finest.grad)
    assert gradients[1].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1] / 3)
