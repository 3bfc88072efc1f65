"""Entry and recipe section of stage `segment`."""

from __future__ import annotations

from vitpipe.config.dense_sections import SegmentConfig
from vitpipe.contracts.graph import DATA, EIGHT_GPUS, Stage

STAGE = Stage(
    name="segment",
    order=70,
    summary="semantic segmentation on ADE20K",
    inputs={**DATA, "weights": ("pretrain", "finetune", "intermediate")},
    reads="ade20k",
    builds=("dense",),
    sections=("seed", "model", "segment"),
    image="dense",
    kind="Model",
    resources=EIGHT_GPUS,
    headline="mIoU",
    curves=("train/loss",),
)
CONFIG = SegmentConfig
