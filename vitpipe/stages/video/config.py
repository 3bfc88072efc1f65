"""Entry and recipe section of stage `video`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from vitpipe.config.data import LocalPath
from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, Pixels, Positive, Section
from vitpipe.contracts.graph import DATA, ONE_GPU, Stage


class VideoConfig(Section):
    """Label propagation on DAVIS 2017, semi-supervised; the defaults are the protocol of DINO and SelfPatch.

    The shorter side of a frame becomes `short_side`, the longer one is reduced to a multiple of
    `size_multiple`. The context of a frame is the first one and the last `num_context_frames`; of their
    patches within `neighbourhood` rows and columns (0: anywhere) the `top_k` most similar ones give a patch
    its labels, weighted by `temperature`. `batch` is frames in one forward pass; of `sample_videos` videos an
    animation is drawn.
    """

    effects: ClassVar[Effects] = Effects(
        weights="weights dataset",
        figures=(
            "short_side size_multiple num_context_frames neighbourhood top_k temperature batch sample_videos"
        ),
    )

    weights: LocalPath | None = None
    dataset: str = "davis"
    short_side: Pixels = 480
    size_multiple: Count = 64
    num_context_frames: Annotated[int, Field(ge=0)] = 7
    neighbourhood: Annotated[int, Field(ge=0)] = 12
    top_k: Count = 5
    temperature: Positive = 0.1
    batch: Count = 8
    sample_videos: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _leaves_a_long_side(self) -> Self:
        if self.size_multiple > self.short_side:
            raise ValueError(
                f"size_multiple {self.size_multiple} is above short_side {self.short_side}: the longer side "
                "of a square frame would be reduced to nothing"
            )
        return self

    def network_misfit(self, model: ModelConfig) -> str:
        """Frames that the network cannot cut into its patches, or whose size it cannot take."""
        unit = model.token_pixels
        for key in ("short_side", "size_multiple"):
            if (value := getattr(self, key)) % unit:
                return f"{key} is {value}, '{model.name}' needs a multiple of {unit}, its patch"
        if not model.takes_any_size and self.short_side != model.image_size:
            return (
                f"short_side is {self.short_side}, but '{model.name}' with these options takes images of "
                f"{model.image_size} x {model.image_size} pixels only: choose a network that takes any size "
                "(vit, revcol, hivit with relative_position: false)"
            )
        return ""


STAGE = Stage(
    name="video",
    order=80,
    summary="objects followed through DAVIS videos by frozen features",
    inputs={**DATA, "weights": ("pretrain", "finetune")},
    reads="davis",
    builds=("encoder",),
    needs_weights=True,
    sections=("seed", "model", "video"),
    # Frames are resized by OpenCV, which the other image does not have.
    image="dense",
    kind="Artifact",
    resources=ONE_GPU,
    headline="JF_mean",
)
CONFIG = VideoConfig
