"""Every head through its stage: steps, predictions, numbers."""

from __future__ import annotations

import importlib

import pytest
import torch

from vitpipe.contracts.logger import MemoryLogger
from vitpipe.models.weights import load_state

pytestmark = [pytest.mark.dense, pytest.mark.slow]

_REVCOLV2 = (
    "model.name=revcolv2_nano",
    "model.pyramid=null",
    "model.decoder=null",
)
_VIT = (
    "model.name=vit_nano",
    "model.pyramid=null",
    "model.decoder=null",
    "model.patch_size=8",
    "segment.inference=null",
    "expect=[]",
)
_SEGMENT = (*_VIT, "stages=[prepare, segment, report]")
_DETECT = (
    *_VIT,
    "stages=[prepare, detect, report]",
    "detect.head.neck=fpn",
    "detect.head.box_convs=0",
    "detect.head.box_linears=2",
)
_SWIN = (
    *_REVCOLV2[1:],
    "model.name=swin_nano",
    "model.relative_position=null",
    "expect=[]",
)
_CASES = {
    "mask_rcnn": ("detect", ()),
    "cascade_mask_rcnn": ("detect", _REVCOLV2),
    "mask2former": ("segment", (*_REVCOLV2, "segment.inference=null", "segment.multi_scale_ratios=[1.5]")),
    "mask_rcnn behind an FPN": ("detect", _DETECT),
    "cascade_mask_rcnn behind an FPN": ("detect", _DETECT),
    "cascade_mask_rcnn with three mask heads": (
        "detect",
        (
            *_SWIN,
            "stages=[prepare, detect, report]",
            "detect.head={neck: fpn, masks: every_stage, by_class: true, stage_weights: [1.0, 0.5, 0.25]}",
            "detect.head={rpn_convs: 1, rpn_loss: smooth_l1, inner_anchors: true, train_proposals: 32}",
            "detect.head={box_loss: giou, norm: batch, anchor_scale: 2.0}",
        ),
    ),
    "upernet on Swin's maps": (
        "segment",
        (
            *_SWIN,
            "stages=[prepare, segment, report]",
            "segment.inference=whole",
            "segment.multi_scale_ratios=[1.0]",
            "segment.multi_scale_flips=false",
        ),
    ),
    "semantic_fpn": ("segment", (*_SEGMENT, "segment.head={name: semantic_fpn, width: 16, neck_width: 16}")),
    "upernet behind a neck": (
        "segment",
        (*_SEGMENT, "segment.head.neck=multi_level", "segment.head.auxiliary_map=3"),
    ),
    "upernet on a pyramid": ("segment", (*_SEGMENT, "model.segment_maps=pyramid")),
}


class CrashError(Exception):
    pass


class CrashAfter(MemoryLogger):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def progress(self, step, num_steps, values):
        if step == self.step:
            raise CrashError


def run_stage(context):
    return importlib.import_module(f"vitpipe.stages.{context.stage}.stage").run(context)


@pytest.mark.parametrize("head", _CASES)
def test_a_head_trains_and_evaluates(make_context, tiny_head, head):
    """On a network that has a pyramid of its own, and on one that takes images of any size."""
    stage, changes = _CASES[head]
    context = make_context(stage, recipe=tiny_head(head.split()[0], f"{stage}.log_every_steps=1", *changes))
    metrics = run_stage(context)
    params = metrics.pop("params")
    saved = load_state(context.folder / "weights.safetensors")
    # Without running statistics and the like, which are buffers.
    assert 0 < params <= sum(tensor.numel() for tensor in saved.values())
    assert metrics
    assert all(0.0 <= value <= 1.0 for value in metrics.values())
    names = {name for _, name, _ in context.logger.points}
    losses = [value for _, name, value in context.logger.points if name == "train/loss"]
    assert len(losses) >= 3
    assert all(0.0 < value < 1e3 for value in losses)
    if head.startswith("cascade_mask_rcnn"):
        assert {f"train/s{number}.loss_bbox" for number in range(3)} <= names
        num_mask_heads = 3 if "three" in head else 1
        learned = {f"train/s{number}.loss_mask" for number in range(num_mask_heads)}
        assert {name for name in names if "loss_mask" in name} == learned
    if head == "mask2former":
        assert {"train/decode.loss_dice", "train/decode.d0.loss_mask"} <= names
        assert {"mIoU", "multi_scale_mIoU"} <= set(metrics)
    if "Swin" in head:
        # One size, its own, without a mirror image.
        assert metrics["multi_scale_mIoU"] == metrics["mIoU"] > 0.0
        rows = {
            row["metric"]: row for row in context.logger.tables["protocol"] if row["setting"] == "inference"
        }
        assert rows["multi_scale_mIoU"]["value"] == "whole picture, 1 scale"


def test_a_killed_and_resumed_mask2former_ends_with_the_same_weights(make_context, tiny_head):
    """Its losses draw points: the same ones after a resumption."""
    recipe = tiny_head("mask2former", "segment.checkpoint_minutes=1e-9")
    whole = make_context("segment", "whole", recipe=recipe)
    metrics = run_stage(whole)
    with pytest.raises(CrashError):
        run_stage(make_context("segment", "killed", CrashAfter(2), recipe))
    again = make_context("segment", "killed", recipe=recipe)
    assert run_stage(again) == metrics
    assert any("after step 1" in line for line in again.logger.lines)
    first, second = (load_state(context.folder / "weights.safetensors") for context in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
