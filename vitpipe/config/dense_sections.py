"""The sections of detection and segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.head import HEADS, DetectionHead, SegmentationHead
from vitpipe.config.model import ModelConfig
from vitpipe.config.named import settings_of
from vitpipe.config.section import Count, Effects, Pixels, Positive, Range, Ratio
from vitpipe.config.train_sections import LoopConfig, OptimConfig, in_epochs

# Of the four maps that all networks have for dense tasks.
COARSEST_STRIDE = 32


class DetectOptimConfig(OptimConfig):
    """mmdetection's defaults: the rate is absolute, drops at epochs, times a warm-up in steps.

    With `decay_vectors` biases and norms decay, too, as they do in mmdetection's and mmsegmentation's
    released configurations: all but what the network exempts by name, and norms without `decay_norms`. Heads
    learn at `head_rate` times the learning rate, and so do at `restart_rate` what the network cannot take
    from pre-training (PaCa's last map of a clustering, which has other clusters in segmentation).
    """

    effects: ClassVar[Effects] = Effects(weights="decay_vectors decay_norms head_rate restart_rate")

    decay_vectors: bool = False
    decay_norms: bool = True
    head_rate: Positive = 1.0
    restart_rate: Positive = 1.0

    lr_reference_batch: Count | None = None
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.9
    schedule: Literal["cosine", "step", "poly", "constant"] = "step"
    schedule_start: Literal["after_warmup", "run"] = "run"
    warmup_steps: Annotated[int, Field(ge=0)] | None = 500
    # As in iTPN's released configurations.
    warmup_factor: Ratio | None = 1e-3


class SegmentOptimConfig(DetectOptimConfig):
    """mmsegmentation's defaults: the rate is absolute, falls linearly to 0, times a warm-up in steps."""

    effects: ClassVar[Effects] = Effects()

    schedule: Literal["cosine", "step", "poly", "constant"] = "poly"
    warmup_factor: Ratio | None = 1e-6


class DenseConfig(LoopConfig):
    """What detection and segmentation share."""

    effects: ClassVar[Effects] = Effects(
        weights="drop_path flip_probability",
        nothing="register_model",
    )

    # Images per GPU in iTPN's released launch lines.
    most_per_gpu: ClassVar[int] = 2
    drop_path: Ratio = 0.0
    flip_probability: Ratio = 0.5
    log_every_steps: Count = 50
    # Into MLflow's model registry, where it can be served.
    register_model: bool = False


class DetectConfig(DenseConfig):
    """COCO detection and instance segmentation.

    Large-scale jitter (ViTDet's, arXiv 2203.16527) resizes to `jitter_size` times a ratio of `jitter_range`,
    then crops and pads to that square; `multi_scale` (iTPN's, section 9) takes one of `short_sides`.
    """

    effects: ClassVar[Effects] = Effects(
        weights=("head epochs short_sides long_side crop_branch augment jitter_size jitter_range"),
        figures="test_size",
    )

    dataset: str = "coco"
    head: DetectionHead = Field(default_factory=lambda: settings_of(HEADS, "mask_rcnn"))
    epochs: Positive
    optim: DetectOptimConfig
    # DETR's sizes, which the detection rows of all papers train with.
    short_sides: Annotated[tuple[Pixels, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    long_side: Pixels = 1333
    crop_branch: bool = True
    augment: Literal["multi_scale", "large_scale_jitter"] = "multi_scale"
    jitter_size: Pixels = 1024
    jitter_range: Range = (0.1, 2.0)
    test_size: tuple[Pixels, Pixels] = (1333, 800)

    @property
    def pad_multiple(self) -> int:
        """Images are padded to multiples of it, in training and in evaluation."""
        # After the jitter no side is longer than the square's: multiples of its side give the square.
        return self.jitter_size if self.augment == "large_scale_jitter" else COARSEST_STRIDE

    def network_misfit(self, model: ModelConfig) -> str:
        """Maps that the head cannot read, or padded images that the network cannot cut into its patches."""
        if self.pad_multiple % model.token_pixels:
            return (
                f"augment pads images to multiples of {self.pad_multiple} pixels, "
                f"'{model.name}' needs multiples of {model.token_pixels}"
            )
        return self.head.misfit(model)

    def length(self, steps_per_epoch: int) -> tuple[int, str]:
        """`epochs` in steps, see `LoopConfig.length`."""
        return in_epochs(self.epochs, steps_per_epoch)


class SegmentConfig(DenseConfig):
    """ADE20K semantic segmentation (iTPN, section 10).

    In tests a window of `crop_size` slides by `stride`, or the network sees whole pictures; if `inference`
    does not say, as is usual for the head. With `multi_scale_ratios` there is a second figure: the mean over
    these sizes and, with `multi_scale_flips`, their mirror images.
    """

    effects: ClassVar[Effects] = Effects(
        weights="head steps crop_size scale resize_range photometric",
        figures="inference stride multi_scale_ratios multi_scale_flips",
    )

    dataset: str = "ade20k"
    head: SegmentationHead = Field(default_factory=lambda: settings_of(HEADS, "upernet"))
    steps: Count
    optim: SegmentOptimConfig
    crop_size: Pixels = 512
    scale: tuple[Pixels, Pixels] = (2048, 512)
    resize_range: Range = (0.5, 2.0)
    photometric: bool = True
    inference: Literal["slide", "whole"] | None = None
    # Two thirds of the window, as UPerNet rows are tested.
    stride: Pixels = 341
    multi_scale_ratios: tuple[Positive, ...] = ()
    multi_scale_flips: bool = True

    def network_misfit(self, model: ModelConfig) -> str:
        """A window that the network cannot take."""
        unit = model.token_pixels
        if self.crop_size % unit:
            return f"crop_size is {self.crop_size}, '{model.name}' needs a multiple of {unit}"
        return self.head.misfit(model)

    def length(self, steps_per_epoch: int) -> tuple[int, str]:
        """`steps`, see `LoopConfig.length`."""
        return self.steps, "as the recipe says"
