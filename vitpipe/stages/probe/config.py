"""Entry and recipe section of stage `probe`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from vitpipe.config.data import LocalPath
from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, LearningRate, Positive, Section
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.graph import CLASSES, DATA, ONE_GPU, Stage


class LinearConfig(TrainConfig):
    """Linear classification as papers train it: augmented images through the frozen network, every epoch."""


def _checked(rates: float | tuple[float, ...]) -> float | tuple[float, ...]:
    if not isinstance(rates, tuple):
        return rates
    if not rates:
        raise ValueError("the list is empty: give one learning rate or several")
    if again := [rate for place, rate in enumerate(rates) if rate in rates[:place]]:
        raise ValueError(f"the list has the learning rate {again[0]:g} twice")
    return rates[0] if len(rates) == 1 else rates


def _form(value: Any) -> str:
    return "[several]" if isinstance(value, list | tuple) else "[one]"


# The form decides which of the two is tried: a mistake in one is told once. Tags in brackets are not shown.
Rates = Annotated[
    Annotated[LearningRate, Tag("[one]")] | Annotated[tuple[LearningRate, ...], Tag("[several]")],
    Discriminator(_form),
    AfterValidator(_checked),
]


class ProbeConfig(Section):
    """k-nearest-neighbour and linear classification on frozen features.

    `weights` is a converted checkpoint, instead of the weights of the stage before. Without `dataset` they
    classify the set that the weights were trained on, which then needs classes; imagenet for a checkpoint.
    Without `linear` the linear classifier is trained on features computed once, from centre crops, by
    `epochs`, `batch` and `base_lr`, the peak learning rate per 256 images. Of several rates the best is
    chosen by a held-out tenth of the training images. The rate follows a cosine by `schedule_unit`. The
    linear classifiers read `last_blocks` blocks (DINO: 4), the nearest neighbours the last one; features are
    standardised per channel unless `standardise` is off (DINO, MoBY, MoCo-v3). With `best_epoch` the best
    epoch on the validation images is measured, too, which DINO reports.
    """

    effects: ClassVar[Effects] = Effects(
        weights="weights dataset linear last_blocks standardise epochs batch base_lr schedule_unit",
        figures="best_epoch neighbours temperature eval_crop_ratio",
    )

    weights: LocalPath | None = None
    dataset: str | None = None
    linear: LinearConfig | None = None
    last_blocks: Count = 1
    standardise: bool = True
    # Features are computed once, so these 90 epochs cost minutes even for ImageNet.
    epochs: Count = 90
    batch: Count = 1024
    base_lr: Rates = 0.1
    schedule_unit: Literal["step", "epoch"] = "step"
    best_epoch: bool = False
    # k = 20 and temperature 0.07: the weighted k-NN of DINO, which SelfPatch reports with.
    neighbours: Count = 20
    temperature: Positive = 0.07
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from, at least one."""
        return self.base_lr if isinstance(self.base_lr, tuple) else (self.base_lr,)

    def network_misfit(self, model: ModelConfig) -> str:
        """More blocks than have a vector of the image."""
        if self.last_blocks <= (most := model.num_frozen_blocks):
            return ""
        return f"last_blocks is {self.last_blocks}, of '{model.name}' with these options {most} can be read"


STAGE = Stage(
    name="probe",
    order=50,
    summary="frozen features by nearest neighbours and a linear classifier",
    inputs={**DATA, "weights": ("pretrain", "finetune")},
    reads=CLASSES,
    builds=("encoder",),
    needs_weights=True,
    sections=("seed", "model", "probe"),
    image="train",
    kind="Artifact",
    resources=ONE_GPU,
    headline="linear_top1",
)
CONFIG = ProbeConfig
