"""Entry and recipe section of stage `finetune`."""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.section import Effects
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.contracts.graph import CLASSES, DATA, EIGHT_GPUS, Stage


class FinetuneConfig(ClassifyConfig):
    """Fine-tuning on the target classes; its result is a model that people use."""

    effects: ClassVar[Effects] = Effects()

    register_model: bool = True


STAGE = Stage(
    name="finetune",
    order=40,
    summary="fine-tuning on the target classes",
    inputs={**DATA, "weights": ("intermediate", "pretrain")},
    reads=CLASSES,
    sections=("seed", "model", "finetune"),
    image="train",
    kind="Model",
    resources=EIGHT_GPUS,
    headline="top1",
    curves=("train/loss", "val/top1"),
    gives_weights=True,
)
CONFIG = FinetuneConfig
