"""Entry and recipe section of stage `intermediate`."""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.section import Effects
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.contracts.graph import CLASSES, DATA, EIGHT_GPUS, Stage


class IntermediateConfig(ClassifyConfig):
    """Fine-tuning on a larger set between pre-training and the final fine-tuning."""

    effects: ClassVar[Effects] = Effects(
        weights="dataset",
    )

    dataset: str = "imagenet22k"


STAGE = Stage(
    name="intermediate",
    order=30,
    summary="fine-tuning on the larger label set",
    inputs={**DATA, "weights": ("pretrain",)},
    reads=CLASSES,
    sections=("seed", "model", "intermediate"),
    image="train",
    kind="Model",
    resources=EIGHT_GPUS,
    headline="top1",
    curves=("train/loss", "val/top1"),
    gives_weights=True,
)
CONFIG = IntermediateConfig
