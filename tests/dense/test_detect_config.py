"""Mask R-CNN's configuration: the values of iTPN's released configurations, one by one."""

from __future__ import annotations

import pytest
import torch

from vitpipe.contracts.errors import DatasetError
from vitpipe.dense.coco_dataset import coco_dataset, eval_pipeline, padding_groups, train_pipeline
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.method import DenseMethod
from vitpipe.dense.mm_import import open_detection

pytestmark = pytest.mark.dense


@pytest.fixture(scope="module")
def config(full_recipe):
    return detector_config(full_recipe.detect, full_recipe.model, num_classes=80, norm="SyncBN")


@pytest.fixture(scope="module")
def detector(config, full_recipe):
    """The full network without memory."""
    open_detection()
    with torch.device("meta"):
        return build_detector(config, full_recipe.detect)


def test_backbone_and_input(config):
    assert config["data_preprocessor"]["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert config["data_preprocessor"]["std"] == pytest.approx([58.395, 57.12, 57.375])
    assert config["data_preprocessor"]["bgr_to_rgb"]
    assert config["data_preprocessor"]["pad_size_divisor"] == 32
    assert config["backbone"]["drop_path"] == 0.05
    assert config["backbone"]["model"]["pyramid"]["dense_depth"] == 2
    assert "neck" not in config


def test_region_proposals(config):
    head = config["rpn_head"]
    assert (head["in_channels"], head["feat_channels"]) == (256, 256)
    anchors = head["anchor_generator"]
    assert (anchors["scales"], anchors["ratios"]) == ([8.0], [0.5, 1.0, 2.0])
    assert anchors["strides"] == [4, 8, 16, 32, 64]
    rules, proposals = config["train_cfg"]["rpn"], config["train_cfg"]["rpn_proposal"]
    assert [rules["assigner"][k] for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")] == [0.7, 0.3, 0.3]
    assert (rules["sampler"]["num"], rules["sampler"]["pos_fraction"]) == (256, 0.5)
    assert (proposals["nms_pre"], proposals["max_per_img"], proposals["nms"]["iou_threshold"]) == (
        2000,
        1000,
        0.7,
    )
    tested = config["test_cfg"]["rpn"]
    assert (tested["nms_pre"], tested["max_per_img"], tested["nms"]["iou_threshold"]) == (1000, 1000, 0.7)
    assert head["loss_cls"] == {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    assert head["loss_bbox"] == {"type": "L1Loss", "loss_weight": 1.0}


def test_box_head(config):
    extractor, head = config["roi_head"]["bbox_roi_extractor"], config["roi_head"]["bbox_head"]
    assert extractor["roi_layer"] == {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}
    assert extractor["featmap_strides"] == [4, 8, 16, 32]
    assert (head["type"], head["num_shared_convs"], head["num_shared_fcs"]) == ("ConvFCBBoxHead", 4, 1)
    assert (head["conv_out_channels"], head["fc_out_channels"], head["num_classes"]) == (256, 1024, 80)
    assert head["norm_cfg"]["type"] == "SyncBN"
    assert head["reg_decoded_bbox"]
    assert not head["reg_class_agnostic"]
    assert head["loss_bbox"] == {"type": "GIoULoss", "loss_weight": 10.0}
    assert head["bbox_coder"]["target_stds"] == [0.1, 0.1, 0.2, 0.2]
    rules = config["train_cfg"]["rcnn"]
    assert [rules["assigner"][k] for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")] == [0.5] * 3
    assert (rules["sampler"]["num"], rules["sampler"]["pos_fraction"]) == (512, 0.25)
    assert rules["sampler"]["add_gt_as_proposals"]


def test_mask_head_and_test_rules(config):
    extractor, head = config["roi_head"]["mask_roi_extractor"], config["roi_head"]["mask_head"]
    assert extractor["roi_layer"]["output_size"] == 14
    assert (head["num_convs"], head["conv_out_channels"], head["num_classes"]) == (4, 256, 80)
    assert config["train_cfg"]["rcnn"]["mask_size"] == 28
    rules = config["test_cfg"]["rcnn"]
    assert (rules["score_thr"], rules["nms"]["iou_threshold"]) == (0.05, 0.5)
    assert (rules["max_per_img"], rules["mask_thr_binary"]) == (100, 0.5)


def test_pipelines(full_recipe):
    steps = train_pipeline(full_recipe.detect)
    assert [s["type"] for s in steps][1:] == [
        "LoadAnnotations",
        "RandomFlip",
        "RandomChoice",
        "PackDetInputs",
    ]
    assert steps[2]["prob"] == 0.5
    plain, cropped = steps[3]["transforms"]
    assert [short for short, _ in plain[0]["scales"]] == list(range(480, 801, 32))
    assert {long for _, long in plain[0]["scales"]} == {1333}
    assert [short for short, _ in cropped[0]["scales"]] == [400, 500, 600]
    assert (cropped[1]["crop_type"], cropped[1]["crop_size"]) == ("absolute_range", (384, 600))
    assert cropped[2] == plain[0]
    assert eval_pipeline(full_recipe.detect)[1] == {
        "type": "Resize",
        "scale": (1333, 800),
        "keep_ratio": True,
    }


def test_parameters_of_the_published_network(detector):
    # Supplement, table 13, has 103 M; the released network of this configuration counts 101.5 M.
    count = sum(parameter.numel() for parameter in detector.parameters())
    assert round(count / 1e6, 1) == 101.5
    assert type(detector.roi_head.bbox_head.shared_convs[0].bn).__name__ == "SyncBatchNorm"


def test_layer_decay(detector, full_recipe):
    groups = DenseMethod(detector).groups(full_recipe.detect.optim)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert len(scale) == len(list(detector.named_parameters()))
    # Module m of the block list (merges counted, 0 ... 31) has id m + 1, and 0.9 ** (31 - id).
    net = "backbone.net.backbone"
    expected = {
        f"{net}.stem.proj.weight": 0.9**31,
        f"{net}.stage4.0.mlp.fc1.weight": 0.9**30,
        f"{net}.merge4to8.linear.weight": 0.9**27,
        f"{net}.stage8.0.mlp.fc1.weight": 0.9**26,
        f"{net}.merge8to16.linear.weight": 0.9**23,
        f"{net}.stage16.0.attn.qkv.weight": 0.9**22,
        f"{net}.stage16.23.attn.qkv.weight": 0.9**-1,
        f"{net}.absolute_position": 1.0,
        "backbone.net.pyramid.lateral8.weight": 1.0,
        "roi_head.bbox_head.fc_cls.weight": 1.0,
    }
    assert {name: scale[name] for name in expected} == pytest.approx(expected)
    assert decay[f"{net}.absolute_position"] == decay["rpn_head.rpn_conv.bias"] == 0.0
    assert decay[f"{net}.stem.norm.weight"] == 0.0
    assert decay["rpn_head.rpn_conv.weight"] == decay[f"{net}.stem.proj.weight"] == 0.05


def test_missing_annotations_are_named(raw_sets, tmp_path):
    from types import SimpleNamespace

    empty = SimpleNamespace(root=tmp_path, classes=("one",), scratch=tmp_path, digest="0" * 64)
    with pytest.raises(DatasetError, match="instances_train2017"):
        coco_dataset(empty, "train", [])
    place = tmp_path / "annotations" / "instances_train2017.json"
    place.parent.mkdir()
    (tmp_path / "train2017").mkdir()
    for content, message in (("{", "damaged"), ('{"images": []}', "'annotations'")):
        place.write_text(content)
        with pytest.raises(DatasetError, match=message):
            coco_dataset(empty, "train", [])


def test_images_without_objects_are_skipped_in_training_only(prepared, full_recipe, tmp_path):
    from vitpipe.datasets.dense_folder import open_dense

    open_detection()
    folder = open_dense(prepared, "coco", tmp_path)
    train, val = coco_dataset(folder, "train", []), coco_dataset(folder, "val", [])
    assert all(train.get_data_info(index)["instances"] for index in range(len(train)))
    assert len(val) == folder.counts["val_images"]
    assert set(padding_groups(full_recipe.detect, train)) <= {0, 1}
    # Category ids have gaps; labels have none.
    assert val.cat_ids == sorted(val.cat_ids)
    assert max(val.cat_ids) > len(val.cat_ids)
