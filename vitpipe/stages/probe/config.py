"""Entry and recipe section of stage `probe`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from vitpipe.config.section import Count, Effects, Positive, Section
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.graph import CLASSES, DATA, ONE_GPU, Stage


class LinearConfig(TrainConfig):
    """Linear classification as papers train it: augmented images through the frozen network, every epoch."""


class ProbeConfig(Section):
    """k-nearest-neighbour and linear classification on frozen features.

    Without `dataset` they classify the set that the weights were trained on, which then needs classes.
    Without `linear` the linear classifier is trained on features computed once, from centre crops, by
    `epochs`, `batch` and `base_lr`.
    """

    effects: ClassVar[Effects] = Effects(
        weights="dataset linear epochs batch base_lr",
        figures="neighbours temperature eval_crop_ratio",
    )

    dataset: str | None = None
    linear: LinearConfig | None = None
    # Features are computed once, so these 90 epochs cost minutes even for ImageNet.
    epochs: Count = 90
    batch: Count = 1024
    base_lr: Positive = 0.1
    # k = 20 and temperature 0.07: the weighted k-NN of DINO, which SelfPatch reports with.
    neighbours: Count = 20
    temperature: Positive = 0.07
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256


STAGE = Stage(
    name="probe",
    order=50,
    summary="frozen features by nearest neighbours and a linear classifier",
    inputs={**DATA, "weights": ("pretrain", "finetune")},
    reads=CLASSES,
    builds=("encoder",),
    sections=("seed", "model", "probe"),
    image="train",
    kind="Artifact",
    resources=ONE_GPU,
    headline="linear_top1",
)
CONFIG = ProbeConfig
