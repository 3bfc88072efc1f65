"""iTPN's detectors on COCO: released settings, sizes, and a run on a pre-trained pyramid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitpipe.config.read import load_recipe
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.contracts.artifact import Artifact
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.mm_import import open_detection
from vitpipe.models.build import build_pretrainer
from vitpipe.models.families import family_of
from vitpipe.models.weights import load_state, save_weights
from vitpipe.optim.schedules import learning_rate

pytestmark = pytest.mark.dense

_3X = [f"itpn/coco_{by}/{head}_3x" for by in ("pixel", "clip") for head in ("mask_rcnn", "cascade")]
_CLASSES = 80


def recipe(name, *overrides):
    return load_recipe(name, "full", ("data.root=.", *overrides))


def detector_values(chosen, norm="BN"):
    open_detection()
    return detector_config(chosen.detect, chosen.model, num_classes=_CLASSES, norm=norm)


# 9.4 of the specification: epochs, drops, rate, layer decay, drop path, layer scale, pyramid blocks.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixel_base", (12, (9, 11), 2e-4, 0.90, 0.05, None, 2)),
        ("coco_pixel/mask_rcnn_1x", (12, (9, 11), 2e-4, 0.90, 0.05, None, 2)),
        ("coco_pixel/mask_rcnn_3x", (36, (27, 33), 1.5e-4, 0.90, 0.30, None, 2)),
        ("coco_pixel/cascade_3x", (36, (27, 33), 1e-4, 0.90, 0.20, None, 2)),
        ("clip_base/800/decay_50", (12, (9, 11), 1.5e-4, 0.90, 0.30, 0.1, 1)),
        ("coco_clip/mask_rcnn_3x", (36, (27, 33), 1.5e-4, 0.90, 0.30, 0.1, 1)),
        ("coco_clip/cascade_3x", (36, (27, 33), 1e-4, 0.90, 0.20, 0.1, 1)),
        ("clip_large/clip_l16/decay_55", (12, (9, 11), 2e-4, 0.95, 0.20, 0.1, 1)),
        ("pixel_large", (12, (9, 11), 2e-4, 0.95, 0.20, None, 2)),
    ],
)
def test_each_run_has_the_released_settings(name, expected):
    chosen = recipe(f"itpn/{name}")
    section, model, optim = chosen.detect, chosen.model, chosen.detect.optim
    assert expected == (
        section.epochs,
        optim.drop_epochs,
        optim.base_lr,
        optim.layer_decay,
        section.drop_path,
        model.layer_scale,
        model.pyramid.dense_depth,
    )
    assert section.head.neck == "none"
    assert (model.detect_position == "per_axis") == (name.startswith("clip_large"))
    assert (section.global_batch, optim.weight_decay, optim.warmup_steps) == (64, 0.05, 500)


@pytest.mark.parametrize(
    ("own", "whole"),
    [("coco_pixel/cascade_3x", "pixel_base"), ("coco_clip/mask_rcnn_3x", "clip_base/800/decay_50")],
)
def test_runs_of_a_table_share_the_pre_training(own, whole):
    ours, theirs = recipe(f"itpn/{own}"), recipe(f"itpn/{whole}")
    assert ours.pretrain == theirs.pretrain
    assert ours.model.model_dump() == theirs.model.model_dump()


@pytest.mark.parametrize("name", ["itpn/coco_pixel/cascade_3x", "itpn/coco_clip/cascade_3x"])
def test_the_cascade(name):
    values = detector_values(recipe(name), norm="SyncBN")
    assert "neck" not in values
    parts, rpn = values["roi_head"], values["rpn_head"]
    assert parts["type"] == "CascadeRoIHead"
    assert parts["stage_loss_weights"] == [1.0, 0.5, 0.25]
    assert rpn["loss_bbox"] == {"type": "SmoothL1Loss", "beta": 1 / 9, "loss_weight": 1.0}
    for number, box in enumerate(parts["bbox_head"], 1):
        assert (box["num_shared_convs"], box["num_shared_fcs"], box["norm_cfg"]["type"]) == (4, 1, "SyncBN")
        assert (box["reg_class_agnostic"], box["reg_decoded_bbox"]) == (False, True)
        assert box["loss_bbox"] == {"type": "GIoULoss", "loss_weight": 10.0}
        stds = [std / number for std in (0.1, 0.1, 0.2, 0.2)]
        assert box["bbox_coder"]["target_stds"] == pytest.approx(stds)
    assert [stage["assigner"]["pos_iou_thr"] for stage in values["train_cfg"]["rcnn"]] == [0.5, 0.6, 0.7]
    assert values["train_cfg"]["rpn_proposal"]["max_per_img"] == 2000
    assert values["test_cfg"]["rpn"]["max_per_img"] == 1000


def _box_head(classes=_CLASSES, width=256, hidden=1024):
    convolutions = 4 * (9 * width * width + 2 * width)  # no bias, batch norm
    return convolutions + (49 * width + 1) * hidden + (hidden + 1) * (classes + 1 + 4 * classes)


def _mask_head(classes=_CLASSES, width=256):
    return 4 * (9 * width + 1) * width + (4 * width + 1) * width + (width + 1) * classes


@pytest.mark.parametrize(
    ("name", "heads", "network"),
    [
        # Backbone and pyramid: tests/models/test_every_model.py; one and two pyramid blocks of 526,080.
        ("coco_pixel/mask_rcnn_3x", 1, 82_604_160),
        ("coco_pixel/cascade_3x", 3, 82_604_160),
        ("coco_clip/cascade_3x", 3, None),
        ("vit_base/itpn/400/decay_50", 1, None),
    ],
)
def test_parameters_are_those_of_the_parts(name, heads, network):
    chosen = recipe(f"itpn/{name}")
    with torch.device("meta"):
        built = build_detector(detector_values(chosen), chosen.detect)
        bare = family_of(chosen.model).dense(chosen.model, "detect", image_size=224, drop_path=0.0)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in built.named_children()}
    assert counts["backbone"] == sum(p.numel() for p in bare.parameters())
    assert network in (None, counts["backbone"])
    assert counts["rpn_head"] == (9 * 256 + 1) * 256 + 257 * 3 * 5
    assert counts["roi_head"] == heads * (_box_head() + _mask_head())
    assert set(counts) == {"data_preprocessor", "backbone", "rpn_head", "roi_head"}


def test_mae_in_table_13_to_the_printed_digit():
    chosen = recipe("itpn/vit_base/mae/1600/decay_65")
    with torch.device("meta"):
        built = build_detector(detector_values(chosen), chosen.detect)
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == 115


def test_the_same_detector_stands_in_two_recipes():
    assert recipe("itpn/coco_pixel/mask_rcnn_1x").detect == recipe("itpn/pixel_base").detect


def test_the_learning_rate_of_3x():
    section = recipe(_3X[1]).detect
    plan = train_plan(
        section,
        path="detect",
        num_images=117_266,
        num_ranks=32,
        accelerator=Accelerator("cuda", has_bf16=True),
    )
    epoch = plan.steps_per_epoch
    assert plan.num_steps == 36 * epoch
    rates = [learning_rate(step, plan, section.optim) for step in (0, 500, 27 * epoch, 33 * epoch)]
    assert rates == pytest.approx([1e-7, 1e-4, 1e-5, 1e-6])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "coco_pixel/mask_rcnn_3x",
        "coco_pixel/cascade_3x",
        "coco_clip/cascade_3x",
        "vit_base/itpn/400/decay_50",
        "vit_base/mae/400/decay_65",
    ],
)
def test_a_step_and_an_evaluation_on_a_pre_trained_network(name, make_context, tiny_overrides, tmp_path):
    from vitpipe.stages.detect.stage import run

    tiny = [text for text in tiny_overrides if text.startswith(("detect.", "model."))]
    # Four steps of two images.
    chosen = load_recipe(f"itpn/{name}", "demo", (*tiny, "data.workers=0"))
    context = make_context("detect", recipe=chosen)
    torch.manual_seed(0)
    if chosen.pretrain.method.name == "masked_pixels":
        pretrainer = build_pretrainer(chosen.model, mask_ratio=0.5)
    else:
        pretrainer = family_of(chosen.model).feature_predictor(
            chosen.model, target_width=8, drop_path=0.0, aligned=True
        )
    (tmp_path / "pretrain").mkdir()
    save_weights(pretrainer, tmp_path / "pretrain" / "weights.safetensors")
    before = load_state(tmp_path / "pretrain" / "weights.safetensors")
    weights = Artifact(tmp_path / "pretrain", context.inputs["data"].card, {})
    metrics = run(replace(context, inputs={**context.inputs, "weights": weights}))
    assert all(0.0 <= metrics[key] <= 1.0 for key in ("box_AP", "mask_AP"))
    after = load_state(context.folder / "weights.safetensors")
    account = {row["source"]: row["outcome"] for row in context.logger.tables["weights_account"]}
    lateral = "pyramid.lateral8.weight"
    # The pyramid that was pre-trained is the one that the heads read, and it goes on learning.
    if lateral in before:
        assert account[lateral] == "matched"
        difference = (after[f"backbone.net.{lateral}"] - before[lateral]).abs()
        assert 0 < difference.max() < 0.1
    assert ("neck.lateral_convs.0.conv.weight" in after) == (lateral not in before)
    masks = {key.split(".")[2] for key in after if key.startswith("roi_head.mask_head.")}
    assert masks == ({"0", "1", "2"} if "cascade" in name else {"convs", "upsample", "conv_logits"})
    losses = [value for _, key, value in context.logger.points if key == "train/loss"]
    assert losses
    assert all(value > 0 for value in losses)
