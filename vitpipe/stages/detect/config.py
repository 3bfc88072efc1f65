"""Entry and recipe section of stage `detect`."""

from __future__ import annotations

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.contracts.graph import DATA, EIGHT_GPUS, Stage

STAGE = Stage(
    name="detect",
    order=60,
    summary="detection and instance segmentation on COCO",
    inputs={**DATA, "weights": ("pretrain", "finetune", "intermediate")},
    reads="coco",
    builds=("dense",),
    sections=("seed", "model", "detect"),
    image="dense",
    kind="Model",
    resources=EIGHT_GPUS,
    headline="box_AP",
    curves=("train/loss",),
)
CONFIG = DetectConfig
