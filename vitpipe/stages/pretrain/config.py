"""Entry and recipe section of stage `pretrain`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vitpipe.config.method import METHODS, PretrainingMethod
from vitpipe.config.model import ModelConfig
from vitpipe.config.named import settings_of
from vitpipe.config.section import Effects
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.graph import DATA, EIGHT_GPUS, PICTURES, Stage


class PretrainConfig(TrainConfig):
    """Pre-training: by default masked image modelling on pixels (iTPN, section 4)."""

    effects: ClassVar[Effects] = Effects(
        weights="method",
    )

    method: PretrainingMethod = Field(default_factory=lambda: settings_of(METHODS, "masked_pixels"))

    def network_misfit(self, model: ModelConfig) -> str:
        """As `TrainConfig`, and an average of the weights, which no method of pre-training keeps."""
        if self.ema_decay is not None:
            return f"ema_decay is {self.ema_decay}, but an average is kept by stages that classify only"
        return super().network_misfit(model)


STAGE = Stage(
    name="pretrain",
    order=20,
    summary="pre-training without labels",
    inputs=DATA,
    reads=PICTURES,
    sections=("seed", "model", "pretrain"),
    image="train",
    kind="Model",
    resources=EIGHT_GPUS,
    headline="loss",
    curves=("train/loss",),
    gives_weights=True,
)
CONFIG = PretrainConfig
